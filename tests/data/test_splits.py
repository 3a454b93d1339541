"""The stratified split: a partition, proportional, and fixed for ever."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rvq_jax.data.splits import (
  hashed_split,
  seeded_permutation,
  stratified_split,
)

LABELS = st.lists(st.integers(-9, 6), min_size=0, max_size=200)


@settings(max_examples=60, deadline=None)
@given(LABELS)
def test_parts_are_a_partition_with_the_share_of_each_class(labels):
  parts = stratified_split(np.array(labels, np.int32))
  assert sorted(i for part in parts for i in part) == list(range(len(labels)))
  assert all(list(part) == sorted(part) for part in parts)
  whole = Counter(labels)
  for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
    counts = Counter(labels[i] for i in part)
    for value, total in whole.items():
      assert abs(counts[value] - fraction * total) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_by_hashes_the_whole_is_divided_and_each_class_as_even_as_can_be(
  labels,
):
  parts = hashed_split(np.array(labels), [str(i) for i in range(len(labels))])
  assert sorted(i for part in parts for i in part) == list(range(len(labels)))
  for part, share in zip(parts, (0.7, 0.2, 0.1), strict=True):
    assert abs(len(part) - share * len(labels)) <= 1
    for value, total in Counter(labels).items():
      assert abs(sum(labels[i] == value for i in part) - share * total) < 2


def test_cifar10_gives_42000_12000_6000_and_equal_classes():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
  parts = stratified_split(labels)
  assert [len(part) for part in parts] == [42_000, 12_000, 6_000]
  for part, count in zip(parts, (4200, 1200, 600), strict=True):
    np.testing.assert_array_equal(np.bincount(labels[part]), [count] * 10)


def test_split_is_the_one_written_down():
  """Changes only if the split of published results changes."""
  train, validation, test = stratified_split(np.repeat([0, 1], 10))
  assert (validation.tolist(), test.tolist()) == ([5, 6, 10, 12], [0, 11])
  assert len(train) == 14


def test_a_permutation_holds_each_index_once_and_depends_on_every_word():
  orders = [
    seeded_permutation(500, *words) for words in ((0, 1), (1, 0), (0, 2))
  ]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(500))
  assert len({order.tobytes() for order in orders}) == 3
