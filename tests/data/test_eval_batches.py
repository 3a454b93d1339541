"""Evaluation reads each image once, in order, padded and masked."""

import numpy as np
import pytest

from rvq_jax.data.loaders import eval_batches

OPTIONS = {'batch_size': 4, 'image_size': 8}


def _valid(batches, ids):
  return [
    i
    for batch in batches
    for i, valid in zip(ids(batch), batch['mask'], strict=True)
    if valid
  ]


@pytest.mark.parametrize('n', [1, 4, 11, 30])
def test_each_image_comes_once_in_order(make_source, ids, n):
  batches = list(eval_batches(make_source(n), **OPTIONS))
  assert len(batches) == -(-n // 4)
  assert all(batch['image'].shape == (4, 8, 8, 3) for batch in batches)
  assert _valid(batches, ids) == list(range(n))


def test_rows_that_fill_the_last_batch_are_masked(make_source):
  [batch] = eval_batches(make_source(3), **OPTIONS)
  assert batch['mask'].tolist() == [True, True, True, False]
  assert not batch['image'][3].any()


@pytest.mark.parametrize('n', [1, 5, 8, 11])
def test_processes_get_equally_many_batches_and_all_rows(make_source, n):
  source = make_source(n)
  whole = list(eval_batches(source, **OPTIONS))
  parts = [
    list(eval_batches(source, process_index=i, process_count=2, **OPTIONS))
    for i in range(2)
  ]
  assert len(parts[0]) == len(parts[1]) == len(whole)
  for one, two, both in zip(*parts, whole, strict=True):
    for key in both:
      joined = np.concatenate([one[key], two[key]])
      np.testing.assert_array_equal(joined, both[key])


def test_corrupt_image_is_masked_and_named(make_source, ids):
  names = []
  batches = eval_batches(
    make_source(100, bad=[50]),
    **OPTIONS,
    on_skip=lambda name, reason: names.append(name),
  )
  assert _valid(batches, ids) == [i for i in range(100) if i != 50]
  assert names == ['00050.png']


def test_more_than_one_percent_corrupt_stops(make_source):
  with pytest.raises(ValueError, match='of 20 images'):
    list(eval_batches(make_source(20, bad=[9]), **OPTIONS))


def test_processes_that_do_not_divide_the_batch_are_refused(make_source):
  with pytest.raises(ValueError, match='divides'):
    next(eval_batches(make_source(4), **OPTIONS, process_count=3))
