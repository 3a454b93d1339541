"""Training batches from memory: order, position, processes, skips."""

import json

import numpy as np
import pytest

from rvq_jax.data import skips
from rvq_jax.data.loaders import make_train_loader
from rvq_jax.data.memory import MemoryLoader

OPTIONS = {'batch_size': 4, 'image_size': 8}


def test_small_set_is_kept_in_memory(make_source):
  loader = make_train_loader(make_source(10), **OPTIONS)
  assert isinstance(loader, MemoryLoader)
  assert loader.images.shape == (10, 8, 8, 3)
  assert (loader.num_examples, loader.steps_per_epoch) == (10, 2)
  batch = next(loader)
  assert batch['image'].shape == (4, 8, 8, 3)
  assert batch['image'].dtype == np.uint8


def test_set_over_the_limit_is_not_kept_in_memory(make_source, monkeypatch):
  monkeypatch.setattr('rvq_jax.data.loaders.MEMORY_LIMIT', 10 * 8 * 8 * 3 - 1)
  loader = make_train_loader(make_source(10), **OPTIONS)
  assert not isinstance(loader, MemoryLoader)
  loader.close()


def test_epoch_has_each_image_once(make_source, ids):
  loader = make_train_loader(make_source(12), **OPTIONS)
  for _ in range(3):
    seen = sum((ids(next(loader)) for _ in range(3)), [])
    assert sorted(seen) == list(range(12))


def test_epochs_have_different_orders_and_drop_different_images(
  make_source, ids
):
  loader = make_train_loader(make_source(11), **OPTIONS)
  epochs = [
    tuple(sum((ids(next(loader)) for _ in range(2)), [])) for _ in range(6)
  ]
  assert len(set(epochs)) == 6
  assert all(len(set(epoch)) == 8 for epoch in epochs)
  assert set().union(*epochs) == set(range(11))


@pytest.mark.parametrize('steps', [0, 1, 3, 7])
def test_seek_continues_with_the_identical_batches(make_source, steps):
  source = make_source(13)
  whole = make_train_loader(source, **OPTIONS)
  for _ in range(steps):
    next(whole)
  saved = json.loads(json.dumps(whole.position()))
  resumed = make_train_loader(source, **OPTIONS)
  resumed.seek(saved)
  for _ in range(9):
    np.testing.assert_array_equal(next(resumed)['image'], next(whole)['image'])
  assert resumed.position() == whole.position()
  assert whole.position()['step'] == steps + 9


def test_seeds_give_different_orders(make_source, ids):
  source = make_source(32)
  orders = {
    tuple(ids(next(make_train_loader(source, seed=seed, **OPTIONS))))
    for seed in range(5)
  }
  assert len(orders) == 5


def test_processes_share_each_batch_without_overlap_or_loss(make_source):
  source = make_source(13)
  whole = make_train_loader(source, **OPTIONS)
  parts = [
    make_train_loader(source, process_index=i, process_count=2, **OPTIONS)
    for i in range(2)
  ]
  for _ in range(7):
    joined = np.concatenate([next(part)['image'] for part in parts])
    np.testing.assert_array_equal(joined, next(whole)['image'])


def test_indices_are_the_rows_of_the_batch(make_source):
  loader = make_train_loader(make_source(13), **OPTIONS)
  for step in range(5):
    rows = loader.indices(step)
    np.testing.assert_array_equal(next(loader)['image'], loader.images[rows])


def test_larger_images_are_shrunk_and_cropped_once(make_source):
  loader = make_train_loader(make_source(6, height=20, width=30), **OPTIONS)
  assert loader.images.shape == (6, 8, 8, 3)
  assert sorted(loader.images[:, 4, 4, 0]) == list(range(6))


def test_corrupt_image_is_left_out_named_and_counted(make_source, ids):
  skipped = []
  source = make_source(200, bad=[7])
  loader = make_train_loader(
    source, **OPTIONS, on_skip=lambda *what: skipped.append(what)
  )
  assert loader.skipped == 1
  assert loader.num_examples == 199
  [(name, reason)] = skipped
  assert name == '00007.png'
  assert 'cannot be decoded' in reason
  seen = sum((ids(next(loader)) for _ in range(49)), [])
  assert len(seen) == len(set(seen)) == 196
  assert 7 not in seen


def test_skipping_logs_a_warning_by_default(make_source, caplog):
  make_train_loader(make_source(100, bad=[3]), **OPTIONS)
  assert '00003.png' in caplog.text


@pytest.mark.parametrize('n, bad', [(10, [2]), (100, [2, 90])])
def test_more_than_one_percent_corrupt_stops(make_source, n, bad):
  with pytest.raises(ValueError, match=f'{len(bad)} of {n} images'):
    make_train_loader(make_source(n, bad=bad), **OPTIONS)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'batch_size': 5, 'process_count': 2}, 'divides'),
    ({'batch_size': 0}, 'positive global batch size'),
    ({'batch_size': 4, 'process_index': 1}, 'process index from 0 to 0'),
    ({'batch_size': 11}, 'the training split has 10'),
    ({'batch_size': 4, 'crop': 'centre'}, "'random_resized'"),
    ({'batch_size': 4, 'crop': 'random', 'in_memory': True}, 'in_memory=False'),
    ({'batch_size': 4, 'in_memory': 'yes'}, "'auto', True or False"),
    ({'batch_size': 4, 'image_size': 0}, 'image_size >= 1'),
    ({'batch_size': 4, 'crop_scale': (0.5, 0.1)}, 'crop_scale'),
  ],
)
def test_bad_arguments_are_refused(make_source, options, message):
  with pytest.raises(ValueError, match=message):
    make_train_loader(make_source(10), **{'image_size': 8, **options})


@pytest.mark.parametrize('position', [None, {}, {'step': -1}, {'step': '3'}])
def test_what_is_not_a_position_is_refused(make_source, position):
  loader = make_train_loader(make_source(10), **OPTIONS)
  with pytest.raises(ValueError, match='expected a position'):
    loader.seek(position)


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_position_in_another_set_is_refused(make_source, in_memory):
  loader = make_train_loader(make_source(10), in_memory=in_memory, **OPTIONS)
  other = make_train_loader(make_source(11), in_memory=in_memory, **OPTIONS)
  next(loader)
  with pytest.raises(ValueError, match='has 11 images .* had 10') as caught:
    other.seek(loader.position())
  assert '\n' not in str(caught.value)
  other.seek({'step': 1})  # of a checkpoint that does not say
  assert other.position()['step'] == 1


def test_images_that_can_be_read_no_longer_change_the_set(make_source):
  whole = make_train_loader(make_source(200), **OPTIONS)
  one_less = make_train_loader(make_source(201, bad=[7, 8]), **OPTIONS)
  with pytest.raises(ValueError, match='has 199 images .* had 200'):
    one_less.seek(whole.position())


@pytest.mark.parametrize('in_memory', [True, False])
def test_want_of_memory_skips_nothing(make_source, monkeypatch, in_memory):
  def full(*arguments, **options):
    raise MemoryError

  monkeypatch.setattr(skips, 'decode_image', full)
  source = make_source(8)
  with pytest.raises(OSError, match='out of memory while decoding 0') as caught:
    next(make_train_loader(source, in_memory=in_memory, **OPTIONS))
  assert '\n' not in str(caught.value)
