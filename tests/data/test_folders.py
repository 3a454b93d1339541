"""folder:PATH: what is found, and one clear line for what is not."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from rvq_jax.data.datasets import open_dataset


def _fill(root, *paths):
  for path in paths:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(file, 'PNG')


def _open(root, split='official'):
  return open_dataset(f'folder:{root}', split=split)


def test_splits_and_classes_are_found_in_sorted_order(tmp_path):
  _fill(
    tmp_path,
    'train/dog/b.PNG',
    'train/dog/a.jpg',
    'train/cat/z.jpeg',
    'val/dog/q.webp',
    'test/cat/r.png',
  )
  (tmp_path / 'train/dog/notes.txt').write_text('not an image')
  (tmp_path / 'train/.DS_Store').write_text('')
  dataset = _open(tmp_path)
  assert [r.name for r in dataset.train] == [
    'train/cat/z.jpeg',
    'train/dog/a.jpg',
    'train/dog/b.PNG',
  ]
  assert dataset.train.labels.tolist() == [0, 1, 1]
  assert dataset.train.labels.dtype == np.int32
  assert dataset.validation.labels.tolist() == [1]
  assert dataset.test.labels.tolist() == [0]
  assert dataset.note == ''


def test_record_holds_the_bytes_of_the_file(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/y.png')
  record = _open(tmp_path).test[0]
  assert record.image == (tmp_path / 'test/a/y.png').read_bytes()
  assert record.label == 0


def test_images_without_class_folders_have_no_label(tmp_path):
  _fill(tmp_path, 'train/x.png', 'validation/y.png')
  dataset = _open(tmp_path)
  assert dataset.train.labels.tolist() == [-1]


@pytest.mark.parametrize('only', ['validation', 'test'])
def test_one_held_out_split_serves_as_both_and_is_noted(tmp_path, only):
  _fill(tmp_path, 'train/x.png', f'{only}/y.png')
  dataset = _open(tmp_path)
  assert dataset.validation[0].name == dataset.test[0].name == f'{only}/y.png'
  assert f'both its {only} split' in dataset.note


def test_flat_folder_needs_the_paper_split(tmp_path):
  _fill(tmp_path, *(f'{i}.png' for i in range(20)))
  with pytest.raises(ValueError, match=r'--config\.data\.split=paper'):
    _open(tmp_path)
  dataset = _open(tmp_path, 'paper')
  sizes = [len(s) for s in (dataset.train, dataset.validation, dataset.test)]
  assert sizes == [14, 4, 2]


def test_class_folders_without_splits_are_stratified(tmp_path):
  _fill(tmp_path, *(f'{c}/{i}.png' for c in 'ab' for i in range(10)))
  dataset = _open(tmp_path, 'paper')
  for source, count in (
    (dataset.train, 7),
    (dataset.validation, 2),
    (dataset.test, 1),
  ):
    assert np.bincount(source.labels).tolist() == [count, count]


def test_paper_split_unites_all_splits(tmp_path):
  _fill(
    tmp_path,
    *(f'train/a/{i}.png' for i in range(10)),
    *(f'val/a/{i}.png' for i in range(6)),
    *(f'test/a/{i}.png' for i in range(4)),
  )
  dataset = _open(tmp_path, 'paper')
  parts = (dataset.train, dataset.validation, dataset.test)
  names = [record.name for part in parts for record in part]
  assert [len(part) for part in parts] == [14, 4, 2]
  assert len(set(names)) == 20


def test_sources_survive_pickling_and_have_stable_reprs(tmp_path):
  _fill(tmp_path, *(f'{i}.png' for i in range(20)))
  source = _open(tmp_path, 'paper').train
  copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
  assert repr(copy) == repr(source)
  assert 'object at' not in repr(source)
  assert [r.name for r in copy] == [r.name for r in source]


def test_subset_keeps_the_order_of_its_indices(tmp_path):
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
    (['train/x.png', 'train/a/x.png', 'test/x.png'], 'both images and folders'),
  ],
)
def test_wrong_layout_is_one_clear_line(tmp_path, files, message):
  _fill(tmp_path, *files)
  with pytest.raises(ValueError, match=message) as error:
    _open(tmp_path)
  assert '\n' not in str(error.value)


def test_class_folder_without_images_is_named(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/x.png')
  (tmp_path / 'train/empty').mkdir()
  with pytest.raises(ValueError, match='train/empty holds no images'):
    _open(tmp_path)


def test_missing_folder_is_named(tmp_path):
  with pytest.raises(ValueError, match='nowhere: No such file'):
    _open(tmp_path / 'nowhere')


def test_folder_one_may_not_read_is_named(tmp_path, monkeypatch):
  _fill(tmp_path, 'train/a/x.png', 'test/a/x.png')
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith('train'):
      raise PermissionError(13, 'Permission denied')
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(ValueError, match='train: Permission denied'):
    _open(tmp_path)


def test_name_that_is_not_utf8_is_read_and_printed_safely(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/x.png')
  folder = os.fsencode(tmp_path / 'test' / 'a')
  try:
    os.rename(folder + b'/x.png', folder + b'/caf\xe9.png')
  except OSError:
    pytest.skip('this file system takes UTF-8 names only')
  record = _open(tmp_path).test[0]
  assert record.name == 'test/a/caf\\xe9.png'
  assert record.image.startswith(b'\x89PNG')


def test_home_is_expanded(tmp_path, monkeypatch):
  _fill(tmp_path, 'set/train/x.png', 'set/test/y.png')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(open_dataset('folder:~/set').train) == 1


@pytest.mark.parametrize('name', ['', 'cifar10', 'tfds:', 'folder:', 'photos:'])
def test_unknown_kind_lists_the_choices(name):
  with pytest.raises(ValueError, match=r'tfds:NAME \| folder:PATH \| photos'):
    open_dataset(name)


def test_unknown_split_lists_the_choices():
  with pytest.raises(ValueError, match="'official', 'paper'"):
    open_dataset('photos', split='random')


def test_too_few_images_for_the_paper_split_are_refused(tmp_path):
  _fill(tmp_path, 'a.png', 'b.png')
  with pytest.raises(ValueError, match='too few'):
    _open(tmp_path, 'paper')
