"""Data sets by name; folders: what is found, and one line for what is not."""

import contextlib
import logging
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rvq_jax.data.datasets import open_dataset, open_images
from rvq_jax.data.transforms import decode_image

NOBODY = 65534


def _fill(root, *paths):
  for path in paths:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(file, 'PNG')


def _open(root, split='official', **options):
  return open_dataset(f'folder:{root}', split=split, **options)


def _parts(dataset):
  return dataset.train, dataset.validation, dataset.test


def _names(source):
  return [record.name for record in source]


def test_splits_and_classes_are_found_in_sorted_order(tmp_path):
  train = ['train/cat/z.jpeg', 'train/dog/a.jpg', 'train/dog/b.PNG']
  _fill(tmp_path, *reversed(train), 'val/dog/q.webp', 'test/cat/r.png')
  (tmp_path / 'train/dog/notes.txt').write_text('not an image')
  (tmp_path / 'train/.DS_Store').write_text('')
  dataset = _open(tmp_path)
  assert _names(dataset.train) == train
  labels = [source.labels.tolist() for source in _parts(dataset)]
  assert labels == [[0, 1, 1], [1], [0]]
  assert dataset.note == ''
  [record] = dataset.test
  assert record.image == (tmp_path / 'test/cat/r.png').read_bytes()


@pytest.mark.parametrize('only', ['validation', 'test'])
def test_one_held_out_split_serves_as_both_and_is_noted(tmp_path, only):
  _fill(tmp_path, 'train/x.png', f'{only}/y.png')
  dataset = _open(tmp_path)
  assert dataset.train.labels.tolist() == [-1]  # no class folders
  assert _names(dataset.validation) == _names(dataset.test) == [f'{only}/y.png']
  assert dataset.note.endswith(f'validation and test are both its {only} split')


def test_a_flat_folder_needs_the_paper_split(tmp_path):
  _fill(tmp_path, *(f'{i}.png' for i in range(20)))
  with pytest.raises(ValueError, match=r'--config\.data\.split=paper'):
    _open(tmp_path)
  parts = _parts(_open(tmp_path, 'paper'))
  assert [len(part) for part in parts] == [14, 4, 2]


def test_the_paper_split_unites_all_splits_and_is_stratified(tmp_path):
  for name, count in (('train', 10), ('val', 6), ('test', 4)):
    for i in range(count):
      _fill(tmp_path, f'{name}/a/{i}.png', f'{name}/b/{i}.png')
  parts = _parts(_open(tmp_path, 'paper'))
  counts = [np.bincount(part.labels).tolist() for part in parts]
  assert counts == [[14, 14], [4, 4], [2, 2]]
  assert len({name for part in parts for name in _names(part)}) == 40
  for part in parts:
    assert [record.label for record in part] == part.labels.tolist()


def test_the_paper_split_depends_on_its_seed_only(tmp_path):
  _fill(tmp_path, *(f'{i}.png' for i in range(40)))
  first, again, other = (
    _names(_open(tmp_path, 'paper', seed=seed).test) for seed in (1, 1, 2)
  )
  assert first == again != other


@pytest.mark.parametrize('split', ['official', 'paper'])
def test_sources_survive_pickling(tmp_path, split):
  for i in range(9):
    _fill(tmp_path, f'train/{i}.png', f'test/{i}.png')
  source = _open(tmp_path, split).train
  copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
  assert list(copy) == list(source)


def test_a_subset_keeps_the_order_of_its_indices(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'train/b/y.png', 'test/a/z.png')
  subset = _open(tmp_path).train.subset(np.array([1, 0, 1]))
  assert [record.label for record in subset] == [1, 0, 1]
  assert subset.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
  'files, message',
  [
    ([], 'holds no images'),
    (['test/a/x.png'], 'no folder train'),
    (['train/a/x.png'], 'one of validation and test'),
    (['train/a/x.png', 'val/x.png', 'validation/x.png'], 'keep one'),
    (['train/x.png', 'train/a/x.png', 'test/x.png'], 'or images only'),
    (
      ['train/a/x.png', 'train/b/.x', 'test/a/y.png'],
      'train/b holds no images',
    ),
  ],
)
def test_a_wrong_layout_is_one_clear_line(tmp_path, files, message):
  _fill(tmp_path, *files)
  with pytest.raises(ValueError, match=message) as error:
    _open(tmp_path)
  assert '\n' not in str(error.value)


def test_too_few_images_for_the_paper_split_are_refused(tmp_path):
  _fill(tmp_path, 'a.png', 'b.png')
  with pytest.raises(ValueError, match='too few'):
    _open(tmp_path, 'paper')


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(ValueError, match='nowhere: No such file'):
    _open(tmp_path / 'nowhere')


@contextlib.contextmanager
def without_privileges():
  """As root, becomes nobody for a while: root may read everything."""
  was = os.geteuid()
  if was == 0:
    os.seteuid(NOBODY)
  try:
    yield
  finally:
    os.seteuid(was)


@pytest.fixture
def images():
  # Not tmp_path, whose parents nobody may enter.
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    _fill(Path(folder), 'train/a/x.png', 'train/b/y.png', 'test/a/z.png')
    yield Path(folder)
    for path in [*Path(folder).rglob('*')]:
      path.chmod(0o755)


@pytest.mark.parametrize('closed', ['train', 'train/b', 'test/a'])
def test_a_folder_without_permission_is_one_line(closed, images):
  (images / closed).chmod(0)
  with (
    without_privileges(),
    pytest.raises(ValueError, match=f'{closed}: Permission denied') as caught,
  ):
    _open(images)
  assert '\n' not in str(caught.value)


def test_a_file_without_permission_is_an_oserror(images):
  (images / 'train/a/x.png').chmod(0)
  source = _open(images).train
  with without_privileges(), pytest.raises(PermissionError):
    source[0]


def test_a_name_that_is_not_utf8_is_read_and_printed_safely(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/x.png')
  folder = os.fsencode(tmp_path / 'test' / 'a')
  try:
    os.rename(folder + b'/x.png', folder + b'/caf\xe9.png')
  except OSError:
    pytest.skip('this file system takes UTF-8 names only')
  [record] = _open(tmp_path).test
  assert record.name == 'test/a/caf\\xe9.png'
  assert record.image.startswith(b'\x89PNG')


def test_home_is_expanded(tmp_path, monkeypatch):
  _fill(tmp_path, 'set/train/x.png', 'set/test/y.png')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(open_dataset('folder:~/set').train) == 1
  assert set(open_images('~/set')) == {'train', 'test'}


@pytest.mark.parametrize('name', ['', 'cifar10', 'tfds:', 'folder:', 'photos:'])
def test_an_unknown_kind_lists_the_choices(name):
  with pytest.raises(ValueError, match=r'tfds:NAME \| folder:PATH \| photos'):
    open_dataset(name)


def test_an_unknown_split_lists_the_choices():
  with pytest.raises(ValueError, match="'official', 'paper'"):
    open_dataset('photos', split='random')


def test_photos_are_the_same_crops_each_time():
  one, two = open_dataset('photos'), open_dataset('photos')
  assert (len(one.train), len(one.test)) == (4000, 400)
  for i in (0, 77, 399):
    assert one.test[i] == two.test[i]
    assert decode_image(one.test[i].image).shape == (64, 64, 3)
  assert 'both its test split' in one.note


def test_train_and_test_photos_come_from_different_photographs():
  dataset = open_dataset('photos')
  assert set(dataset.train.labels) == {0, 2, 3}
  assert set(dataset.test.labels) == {1}


@pytest.mark.parametrize('name', ['photos', 'tfds:photos'])
def test_photos_refuse_the_paper_split(name):
  with pytest.raises(ValueError, match='official') as error:
    open_dataset(name, split='paper')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['photos', './photos', 'folder:photos'])
def test_a_folder_called_photos_goes_before_the_data_set(
  tmp_path, monkeypatch, caplog, name
):
  monkeypatch.chdir(tmp_path)
  assert len(open_images('photos')['test']) == 400
  _fill(tmp_path, 'photos/a.png', 'photos/b.png')
  with caplog.at_level(logging.INFO):
    assert _names(open_images(name)['all']) == ['a.png', 'b.png']
  assert ('tfds:photos' in caplog.text) == (name == 'photos')
  assert len(open_images('tfds:photos')['test']) == 400


def test_images_of_a_file_and_of_one_split_can_be_opened(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/y.png')
  path = str(tmp_path / 'test/a/y.png')
  for name in (path, f'folder:{path}'):
    assert _names(open_images(name)['all']) == ['y.png']
  [(split, source)] = open_images(str(tmp_path), split='test').items()
  assert (split, _names(source)) == ('test', ['test/a/y.png'])
  with pytest.raises(ValueError, match="one of train, test .* got 'val'"):
    open_images(str(tmp_path), split='val')


def test_images_that_do_not_exist_are_one_line(tmp_path):
  with pytest.raises(ValueError, match='there is no .*nothing: expected an'):
    open_images(str(tmp_path / 'nothing'))
