"""Training batches through Grain: order, position, crops, workers, skips."""

import gc
import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

from rvq_jax.data.folders import open_folder
from rvq_jax.data.loaders import make_train_loader

OPTIONS = {'batch_size': 4, 'image_size': 8, 'in_memory': False}
CROPS = ['none', 'random', 'random_resized']


@pytest.fixture
def make(make_source):
  """Makes loaders of one source and closes them."""
  loaders = []

  def build(source, **options):
    loaders.append(make_train_loader(source, **{**OPTIONS, **options}))
    return loaders[-1]

  yield build
  for loader in loaders:
    loader.close()


def _take(loader, n):
  return [next(loader)['image'] for _ in range(n)]


def test_epoch_has_each_image_once(make, make_source, ids):
  loader = make(make_source(12))
  epochs = []
  for _ in range(3):
    epochs.append(sum((ids(next(loader)) for _ in range(3)), []))
    assert sorted(epochs[-1]) == list(range(12))
  assert epochs[0] != epochs[1] != epochs[2]


def test_epochs_drop_different_images(make, make_source, ids):
  loader = make(make_source(11))
  assert loader.steps_per_epoch == 2
  epochs = [sum((ids(next(loader)) for _ in range(2)), []) for _ in range(8)]
  assert all(len(set(epoch)) == 8 for epoch in epochs)
  assert set().union(*epochs) == set(range(11))


def test_neighbouring_seeds_share_no_order(make, make_source, ids):
  source = make_source(32)
  orders = set()
  for seed in range(3):
    loader = make(source, seed=seed, batch_size=32)
    orders |= {tuple(ids(next(loader))) for _ in range(3)}
  assert len(orders) == 9


@pytest.mark.parametrize('crop', CROPS)
@pytest.mark.parametrize('steps', [0, 2, 5])
def test_seek_continues_with_the_identical_batches(
  make, make_source, crop, steps
):
  source = make_source(13, height=20, width=30)
  whole = make(source, crop=crop)
  _take(whole, steps)
  saved = json.loads(json.dumps(whole.position()))
  resumed = make(source, crop=crop)
  resumed.seek(saved)
  np.testing.assert_array_equal(_take(resumed, 6), _take(whole, 6))
  assert resumed.position() == whole.position()
  assert whole.position()['step'] == steps + 6


def test_seek_works_in_a_loader_that_is_running(make, make_source):
  loader = make(make_source(13))
  first = _take(loader, 5)
  loader.seek({'step': 0})
  np.testing.assert_array_equal(_take(loader, 5), first)


@pytest.mark.parametrize('crop', CROPS)
def test_processes_share_each_batch_without_overlap_or_loss(
  make, make_source, crop
):
  source = make_source(13, height=20, width=30)
  whole = make(source, crop=crop)
  parts = [
    make(source, crop=crop, process_index=i, process_count=2) for i in range(2)
  ]
  for _ in range(7):
    joined = np.concatenate([next(part)['image'] for part in parts])
    np.testing.assert_array_equal(joined, next(whole)['image'])


def test_crops_of_one_image_differ_between_epochs(make, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / 'noise.png')
  source = open_folder(str(tmp_path))['all']
  for crop in ('random', 'random_resized'):
    loader = make(source, crop=crop, batch_size=1)
    crops = {next(loader)['image'].tobytes() for _ in range(8)}
    assert len(crops) > 5


def test_corrupt_image_is_replaced_named_and_counted_once(
  make, make_source, ids
):
  skipped = []
  source = make_source(100, bad=[7])
  loader = make(source, on_skip=lambda name, reason: skipped.append(name))
  seen = sum((ids(next(loader)) for _ in range(75)), [])
  assert skipped == ['00007.png']
  assert loader.skipped == 1
  assert set(seen) == set(range(100)) - {7}


def test_corrupt_image_does_not_change_what_follows_a_seek(make, make_source):
  source = make_source(100, bad=[7])
  whole, resumed = make(source), make(source)
  _take(whole, 11)
  resumed.seek({'step': 11})
  np.testing.assert_array_equal(_take(resumed, 40), _take(whole, 40))


def test_more_than_one_percent_corrupt_stops(make, make_source):
  loader = make(make_source(20, bad=[3]))
  with pytest.raises(ValueError, match='1 of 20 images'):
    _take(loader, 5)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_records_that_cannot_be_read_are_no_images(
  make, make_source, num_workers
):
  loader = make(make_source(8, bad=range(8)), num_workers=num_workers)
  with pytest.raises(OSError, match='4 records in a row') as caught:
    next(loader)
  message = str(caught.value)
  assert re.search(r'0000\d.png: .*cannot be decoded', message)
  assert 'goes on from the last checkpoint' in message
  assert '\n' not in message


@pytest.mark.slow
def test_workers_give_the_batches_that_threads_give(make, make_source):
  source = make_source(100, bad=[7], height=20, width=30)
  skipped = []
  threads = make(source, crop='random_resized')
  workers = make(
    source,
    crop='random_resized',
    num_workers=2,
    on_skip=lambda name, reason: skipped.append(name),
  )
  threads.seek({'step': 3})
  workers.seek({'step': 3})
  np.testing.assert_array_equal(_take(workers, 40), _take(threads, 40))
  assert workers.skipped == threads.skipped == 1
  assert skipped == ['00007.png']
  workers.close()
  assert not multiprocessing.active_children()


def test_death_of_a_worker_is_raised_within_seconds(make, make_source):
  loader = make(make_source(12), num_workers=1)
  _take(loader, 2)
  [worker] = multiprocessing.active_children()
  os.kill(worker.pid, signal.SIGKILL)
  start = time.monotonic()
  with pytest.raises(ChildProcessError, match='a data worker died'):
    _take(loader, 50)
  assert time.monotonic() - start < 20


def test_a_forgotten_loader_leaves_no_worker(make_source):
  loader = make_train_loader(make_source(12), num_workers=1, **OPTIONS)
  next(loader)
  [worker] = multiprocessing.active_children()
  del loader
  gc.collect()
  worker.join(timeout=10)
  assert not multiprocessing.active_children()
