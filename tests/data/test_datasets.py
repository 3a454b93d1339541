"""Data sets by name; folders: what is found, and one line for what is not."""

import hashlib
import json
import logging
import os
import pickle

import numpy as np
import pytest
from errors import one_line
from PIL import Image

from rvq_jax.data.datasets import open_dataset, open_images
from rvq_jax.data.transforms import decode_image


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


def _divide(root, split_file=None):
  dataset = _open(root, 'paper', split_file=split_file)
  return [set(_names(part)) for part in _parts(dataset)]


def test_a_folder_is_divided_by_the_hashes_of_its_names(tmp_path):
  # Up to a, b and c: 3, 7 and 13 images; 0.7 and 0.9 of them, rounded: 2 and
  # 3, 5 and 6, 9 and 12.
  expected = [set(), set(), set()]
  for name, *counts in (('a', 2, 1, 0), ('b', 3, 0, 1), ('c', 4, 2, 0)):
    order = [f'{name}/{i}.png' for i in range(sum(counts))]
    _fill(tmp_path, *order)
    order.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for part, count in zip(expected, counts, strict=True):
      part.update(order[:count])
      del order[:count]
  assert _divide(tmp_path) == expected


@pytest.fixture
def divided(tmp_path):
  """A folder of 200 images, its parts, and the file that records them."""
  root, file = tmp_path / 'set', tmp_path / 'split.json'
  _fill(root, *(f'{c}/{i:02d}.png' for c in 'ab' for i in range(100)))
  _open(root, 'paper').write_split(file)
  return root, _divide(root), file


def test_a_recorded_split_outlives_changes_of_the_folder(divided, caplog):
  root, parts, file = divided
  gone = min(parts[0])
  (root / gone).unlink()
  renamed = min(parts[2])
  (root / renamed).rename(root / 'a/new.png')
  _fill(root, *(f'a/x{i}.png' for i in range(5)))
  left = [parts[0] - {gone}, parts[1], parts[2] - {renamed}]
  assert _divide(root, file) == left
  for change in ('missing', 'new'):
    assert f'{change} since the start of the run, and skipped: ' in caplog.text
  assert '2 of 200' in caplog.text and '6 of 200' in caplog.text
  assert _divide(root) != parts  # the reason for the record


def test_a_record_refuses_over_one_percent_missing_and_damage(
  divided, tmp_path
):
  root, parts, file = divided
  _fill(tmp_path / 'other', *(f'{i}.png' for i in range(10)))
  with one_line('other: 200 of the 200 images of the run are miss'):
    _divide(tmp_path / 'other', file)
  for name in sorted(parts[0])[:3]:
    (root / name).unlink()
  with one_line('3 of the 200 images .* over 1%'):
    _divide(root, file)
  file.write_text(file.read_text()[:-9])
  with one_line('split.json is damaged'):
    _divide(root, file)


def _link(root, name, target, make=os.symlink):
  (root / name).parent.mkdir(parents=True, exist_ok=True)
  make(target, root / name)


V1 = [f'v1/{i:02d}.png' for i in range(20)]
LINKS = {
  'a class': lambda root: _link(root, 'latest', 'v1'),
  'files': lambda root: [_link(root, f'a/{x[3:]}', root / x) for x in V1],
  'hard': lambda root: [
    _link(root, f'v2/{x[3:]}', root / x, os.link) for x in V1
  ],
  'inside': lambda root: _link(root, 'v1/again', '.'),
  'the parent': lambda root: _link(root, 'v1/up', '..'),
  'above': lambda root: _link(root, 'up', '../..'),
}


@pytest.mark.parametrize('kind', LINKS)
def test_an_image_of_two_names_is_one_image(tmp_path, caplog, kind):
  root = tmp_path / 'set'
  _fill(root, *V1)
  LINKS[kind](root)
  with caplog.at_level(logging.INFO):
    parts = _divide(root)
  assert [len(part) for part in parts] == [14, 4, 2]
  assert sorted(set.union(*parts)) == V1  # the names that are no links
  assert ' are further names of these (' in caplog.text


def test_links_to_elsewhere_are_read_in_the_order_of_their_names(tmp_path):
  _fill(tmp_path, 'set/b/x.png', 'other/y.png', 'other/sub/z.png')
  root = tmp_path / 'set'
  _link(root, 'a', '../other')
  _link(root, 'b/a.png', '../../other/y.png')  # of the other class as well
  _link(root, 'b/self.png', 'self.png')
  _link(root, 'b/gone.png', 'nowhere.png')
  names = ['a/y.png', 'a/sub/z.png', 'b/x.png']
  assert _names(open_images(str(root))['all']) == names


def test_a_folder_of_only_a_link_to_its_parent_holds_no_images(tmp_path):
  _link(tmp_path / 'set', 'up', '..')
  _fill(tmp_path, 'x.png')
  with one_line('set/up holds no images'):
    open_images(str(tmp_path / 'set'))


def test_splits_that_share_images_are_named_and_divided_once(tmp_path, caplog):
  _fill(tmp_path, *(f'train/a/{i:02d}.png' for i in range(20)))
  _link(tmp_path, 'test', 'train')
  assert [len(x) for x in _parts(_open(tmp_path))] == [20] * 3
  assert '20 images of test are also in train, such as test/' in caplog.text
  parts = _divide(tmp_path)
  assert sum(map(len, parts)) == len({name[-6:] for x in parts for name in x})


def test_a_recorded_split_keeps_both_names_of_an_image(tmp_path):
  _fill(tmp_path, *V1)
  _link(tmp_path, 'latest', 'v1')
  parts = {'train': V1 + ['latest/00.png'], 'validation': V1, 'test': V1}
  split = tmp_path.parent / 'split.json'
  record = {'data': f'folder:{tmp_path}', **parts}  # by an earlier version
  split.write_text(json.dumps(record))
  counts = _open(tmp_path, 'paper', split_file=split)
  assert [len(x) for x in _parts(counts)] == [21, 20, 20]


@pytest.mark.parametrize('split', ['paper', 'official'])
def test_a_moved_folder_is_known_by_its_images(tmp_path, split):
  old, new, file = (tmp_path / x for x in ('old', 'new', 'split.json'))
  names = [f'train/{i}.png' for i in range(30)] + ['val/a.png', 'test/b.png']
  _fill(old, *names)
  dataset = _open(old, split)
  dataset.write_split(file)
  expected = [*map(_names, _parts(dataset))]
  old.rename(new)
  moved = _open(new, split, split_file=file)
  assert [*map(_names, _parts(moved))] == expected
  Image.new('RGB', (5, 5)).save(new / names[0])  # one may be retouched
  _open(new, split, split_file=file)
  Image.new('RGB', (5, 5)).save(new / names[1])
  with one_line('2 of 32 images .* changed, such as train/.*; restore them'):
    _open(new, split, split_file=file)


def test_the_paper_split_unites_all_images_that_have_a_class(tmp_path, caplog):
  names = [f'{x}/{i}.png' for x in 'ab' for i in range(10)]
  names = [f'{split}/{name}' for split in ('train', 'val') for name in names]
  _fill(tmp_path, *names, 'test/x.png', 'test/y.png')
  with caplog.at_level(logging.INFO):
    parts = _parts(_open(tmp_path, 'paper'))
  assert 'skipped 2 images without a class' in caplog.text
  counts = [np.bincount(part.labels).tolist() for part in parts]
  assert counts == [[14, 14], [4, 4], [2, 2]]
  assert sorted(name for part in parts for name in _names(part)) == names
  for part in parts:
    assert [record.label for record in part] == part.labels.tolist()


@pytest.mark.parametrize(
  'files, split, labels',
  [
    # A class called train is no split.
    (['bus/x.png', 'test/y.png', 'train/z.png'], 'all', [0, 1, 2]),
    # A lone train is a split if it holds folders.
    (['train/a/x.png', 'train/b/y.png'], 'train', [0, 1]),
    (['train/x.png', 'train/y.png'], 'all', [0, 0]),
    # Folders in a class belong to it.
    (['a/x.png', 'a/one/deep/y.png', 'b/two/z.png'], 'all', [0, 0, 1]),
  ],
)
def test_folders_are_splits_or_classes(tmp_path, caplog, files, split, labels):
  _fill(tmp_path, *files)
  with caplog.at_level(logging.INFO):
    [(name, source)] = open_images(str(tmp_path)).items()
  assert (name, _names(source)) == (split, files)
  assert source.labels.tolist() == labels
  classes = f'{max(labels) + 1} folders read as classes ('
  assert f'{split} {len(files)} images, {classes}' in caplog.text


def test_all_that_pillow_opens_is_read_and_the_rest_counted(tmp_path, caplog):
  for end in ('bmp', 'gif', 'jpg', 'jp2', 'png', 'ppm', 'tga', 'tif', 'webp'):
    Image.new('RGB', (4, 4)).save(tmp_path / f'x.{end}')
  for name in ('notes.txt', 'x.heic', 'x.eps'):
    (tmp_path / name).write_text('no image')
  os.mkfifo(tmp_path / 'fifo.jpg')  # to open it would wait for ever
  with caplog.at_level(logging.INFO):
    source = open_images(str(tmp_path))['all']
  assert len(source) == 9
  for record in source:
    assert decode_image(record.image).shape == (4, 4, 3)
  assert 'skipped 4 files that are no images (fifo.jpg, notes' in caplog.text


def test_a_subset_keeps_the_order_of_its_indices_and_can_be_pickled(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'train/b/y.png', 'test/a/z.png')
  subset = _open(tmp_path).train.subset(np.array([1, 0, 1]))
  assert [record.label for record in subset] == [1, 0, 1]
  assert subset.labels.tolist() == [1, 0, 1]
  copy = pickle.loads(pickle.dumps(subset))  # noqa: S301, made here
  assert list(copy) == list(subset)


@pytest.mark.parametrize(
  'files, message',
  [
    ([], 'nowhere: No such file'),
    (['notes.txt'], 'holds no images'),
    (['a.png'], 'too few'),
    (['a.png', 'b.png'], r'--config\.data\.split=paper'),
    (['test/a/x.png'], 'no folder train'),
    (['train/a/x.png'], 'one of validation and test'),
    (['train/a/x.png', 'val/x.png', 'validation/x.png'], 'keep one'),
    (['train/x.png', 'train/a/x.png', 'test/x.png'], 'or only images'),
    (['train/a/x.png', 'train/b/.x', 'test/y.png'], 'train/b holds no'),
  ],
)
def test_a_wrong_layout_is_one_clear_line(tmp_path, files, message):
  _fill(tmp_path, *files)
  split = 'paper' if 'too few' in message else 'official'
  with one_line(message):
    _open(tmp_path if files else tmp_path / 'nowhere', split)


@pytest.mark.parametrize('closed', ['train', 'train/b', 'test/a'])
def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch, closed):
  _fill(tmp_path, 'train/a/x.png', 'train/b/y.png', 'test/a/z.png')

  def scandir(path, real=os.scandir):
    if os.fspath(path).endswith(closed):
      raise PermissionError(13, 'Permission denied')
    return real(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  with one_line(f'{closed}: Permission denied'):
    _open(tmp_path)


def test_a_name_that_is_not_utf8_is_read_and_printed_safely(tmp_path):
  _fill(tmp_path, 'train/a/x.png', 'test/a/x.png')
  folder = os.fsencode(tmp_path / 'test' / 'a')
  try:
    os.rename(folder + b'/x.png', folder + b'/caf\xe9\n\x1b.png')
  except OSError:
    pytest.skip('this file system takes UTF-8 names only')
  [record] = _open(tmp_path).test
  assert record.name == 'test/a/caf\\xe9\\n\\x1b.png'
  assert record.image.startswith(b'\x89PNG')


def test_an_unknown_kind_or_split_lists_the_choices():
  for name in ('', 'cifar10', 'tfds:', 'folder:', 'photos:'):
    with one_line(r'folder:PATH \| tfds:NAME \| wds:PATTERN \| .* \| photos'):
      open_dataset(name)
  for name in ('photos', 'tfds:photos'):
    with one_line('expected official or paper, got'):
      open_dataset(name, split='random')
    with one_line('split=official .* got paper'):
      open_dataset(name, split='paper')


def test_photos_are_the_same_crops_each_time():
  one, two = open_dataset('photos'), open_dataset('photos')
  assert (len(one.train), len(one.test)) == (4000, 400)
  for i in (0, 77, 399):
    assert one.test[i] == two.test[i]
    assert decode_image(one.test[i].image).shape == (64, 64, 3)
  assert 'both its test split' in one.note
  # Crops of different photographs.
  assert [set(s.labels) for s in (one.train, one.test)] == [{0, 2, 3, 4}, {1}]


@pytest.mark.parametrize('name', ['photos', './photos', 'folder:photos'])
def test_a_folder_called_photos_wins(tmp_path, monkeypatch, caplog, name):
  monkeypatch.chdir(tmp_path)
  assert len(open_images('photos')['test']) == 400
  _fill(tmp_path, 'photos/a.png', 'photos/b.png')
  with caplog.at_level(logging.INFO):
    assert _names(open_images(name)['all']) == ['a.png', 'b.png']
  assert ('tfds:photos' in caplog.text) == (name == 'photos')
  assert len(open_images('tfds:photos')['test']) == 400


def test_images_of_a_file_of_one_split_and_at_home_can_be_opened(
  tmp_path, monkeypatch
):
  _fill(tmp_path, 'train/a/x.png', 'test/a/y.png')
  monkeypatch.setenv('HOME', str(tmp_path.parent))
  assert set(open_images(f'~/{tmp_path.name}')) == {'train', 'test'}
  assert len(open_dataset(f'folder:~/{tmp_path.name}').train) == 1
  path = str(tmp_path / 'test/a/y.png')
  for name in (path, f'folder:{path}'):
    assert _names(open_images(name)['all']) == ['y.png']
  [(split, source)] = open_images(str(tmp_path), split='test').items()
  assert (split, _names(source)) == ('test', ['test/a/y.png'])
  with one_line("one of train, test .* got 'val'"):
    open_images(str(tmp_path), split='val')
  with one_line('there is no .*nothing: expected an'):
    open_images(str(tmp_path / 'nothing'))
