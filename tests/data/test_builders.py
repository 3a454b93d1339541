"""Preparing data sets: whole or not at all, also by two at once."""

import glob
import hashlib
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import skimage.data

from rvq_jax.data import builders, photos
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.transforms import decode_image

SMALL = {'train': 12, 'test': 4}


def _prepare_small(data_dir):
  builders.prepare_recipe(photos.make_recipe(SMALL), data_dir)


@pytest.fixture
def small_photos(tmp_path, monkeypatch):
  """A folder where `photos` prepares a few crops."""
  monkeypatch.setattr(photos, 'RECIPE', photos.make_recipe(SMALL))
  return str(tmp_path)


def test_photos_are_prepared_on_first_use_and_then_read(small_photos):
  first = open_dataset('photos', data_dir=small_photos)
  again = open_dataset('photos', data_dir=small_photos)
  assert [len(first.train), len(first.test)] == [12, 4]
  assert list(first.train) == list(again.train)
  assert 'both its test split' in first.note
  assert decode_image(first.train[0].image).shape == (64, 64, 3)


def test_photos_are_the_same_wherever_they_are_prepared(
  small_photos, tmp_path_factory
):
  other = str(tmp_path_factory.mktemp('other'))
  one = open_dataset('photos', data_dir=small_photos)
  two = open_dataset('photos', data_dir=other)
  assert list(one.train) == list(two.train)


def test_train_and_test_come_from_different_photographs(small_photos):
  dataset = open_dataset('photos', data_dir=small_photos)
  assert not set(dataset.train.labels) & set(dataset.test.labels)
  assert set(dataset.train.labels) == {0, 2, 3}


def test_photos_refuse_the_paper_split(small_photos):
  with pytest.raises(ValueError, match='official') as error:
    open_dataset('photos', split='paper', data_dir=small_photos)
  assert '\n' not in str(error.value)


def test_records_are_in_the_order_of_their_hashed_keys(small_photos):
  """tfds's order: md5 of the split's name followed by the key."""

  def hashed(i):
    return hashlib.md5(b'train' + str(i).encode()).hexdigest()

  names = [r.name for r in open_dataset('photos', data_dir=small_photos).train]
  assert names == [f'train_{i:05d}' for i in sorted(range(12), key=hashed)]


def test_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(builders, '_publish', fail)
  with pytest.raises(OSError, match='disk full'):
    _prepare_small(str(tmp_path))
  assert not os.path.exists(tmp_path / 'photos' / '1.0.0')
  assert not glob.glob(str(tmp_path / '.photos-incomplete-*'))


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path):
  stale = tmp_path / '.photos-incomplete-abc'
  stale.mkdir()
  (stale / 'dataset_info.json').write_text('half')
  _prepare_small(str(tmp_path))
  assert not stale.exists()
  assert len(open_dataset('photos', data_dir=str(tmp_path)).train) == 12


def _prepare_slowly(data_dir):
  recipe = photos.make_recipe({'train': 10**6, 'test': 4})
  builders.prepare_recipe(recipe, data_dir)


@pytest.mark.slow
def test_killed_preparation_is_not_taken_for_whole(tmp_path):
  process = multiprocessing.get_context('spawn').Process(
    target=_prepare_slowly, args=(str(tmp_path),)
  )
  process.start()
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    if glob.glob(str(tmp_path / '.photos-incomplete-*' / '*-train.*')):
      break
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  assert not os.path.exists(tmp_path / 'photos' / '1.0.0')
  _prepare_small(str(tmp_path))
  assert len(open_dataset('photos', data_dir=str(tmp_path)).train) == 12
  assert not glob.glob(str(tmp_path / '.photos-incomplete-*'))


@pytest.mark.slow
def test_two_preparations_at_once_do_not_harm_each_other(tmp_path):
  context = multiprocessing.get_context('spawn')
  processes = [
    context.Process(target=_prepare_small, args=(str(tmp_path),))
    for _ in range(2)
  ]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
    assert process.exitcode == 0
  assert len(open_dataset('photos', data_dir=str(tmp_path)).train) == 12


def test_without_file_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError('no locks here')

  monkeypatch.setattr(builders.fcntl, 'flock', no_locks)
  write = builders._write

  def overtaken(*args):
    write(*args)
    if len(glob.glob(str(tmp_path / '.photos-incomplete-*'))) == 1:
      _prepare_small(str(tmp_path))

  monkeypatch.setattr(builders, '_write', overtaken)
  _prepare_small(str(tmp_path))
  assert len(open_dataset('photos', data_dir=str(tmp_path)).train) == 12


def test_number_of_shards_can_be_chosen(tmp_path):
  recipe = photos.make_recipe(SMALL)
  directory = builders.prepare_recipe(recipe, str(tmp_path), num_shards=3)
  assert len(glob.glob(f'{directory}/photos-train.*')) == 3
  dataset = open_dataset('photos', data_dir=str(tmp_path))
  assert len({r.name for r in dataset.train}) == 12


def test_version_that_the_builder_does_not_make_is_refused(tmp_path):
  with pytest.raises(ValueError, match='makes version 3.0.2'):
    open_dataset('tfds:cifar10:9.9.9', data_dir=str(tmp_path))
  assert not os.listdir(tmp_path)


def test_folder_one_may_not_write_to_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot create .*data_dir'):
    _prepare_small(str(tmp_path / 'file'))


def test_photographs_load_without_a_download():
  for names in photos.PHOTOGRAPHS.values():
    for name in names:
      image = getattr(skimage.data, name)()
      assert image.dtype == np.uint8
      assert min(image.shape[:2]) >= 300
