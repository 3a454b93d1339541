"""Seeded permutations and the stratified split of the paper (section 4.1).

Both are built from the raw words of NumPy's Philox generator and a stable
sort. NumPy promises those words for ever and on every platform; it does not
promise what `Generator.permutation` returns.
"""

from collections.abc import Sequence

import numpy as np


def seeded_permutation(n: int, *entropy: int) -> np.ndarray:
  """Returns the permutation of range(n) that belongs to `entropy`.

  Args:
    n: number of elements.
    *entropy: non-negative integers, for example a seed and an epoch. Every
      tuple gives its own permutation, the same on every machine.

  Returns:
    int64 array [n].
  """
  words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
  return np.argsort(words, kind='stable')


def seeded_rng(*entropy: int) -> np.random.Generator:
  """Returns the random generator that belongs to `entropy`.

  Args:
    *entropy: non-negative integers.

  Returns:
    A Philox generator at the start of its stream.
  """
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def stratified_split(
  labels: np.ndarray,
  *,
  fractions: Sequence[float] = (0.7, 0.2, 0.1),
  seed: int = 0,
) -> tuple[np.ndarray, ...]:
  """Splits indices so that every split holds the same share of each class.

  Each class is permuted on its own and cut at the rounded cumulative
  fractions, so a split has within one image of its share of every class, and
  the split of one class does not depend on the other classes.

  Args:
    labels: integers [n], one class each; any value is a class.
    fractions: share of each split, positive, adding up to 1.
    seed: non-negative integer.

  Returns:
    One sorted int64 array of indices per fraction. Each index in range(n) is
    in exactly one of them.

  Raises:
    ValueError: if `labels` is not one-dimensional or the fractions are not
      positive or do not add up to 1.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1:
    raise ValueError(f'expected labels of shape [n], got {labels.shape}')
  if min(fractions, default=0) <= 0 or abs(sum(fractions) - 1) > 1e-6:
    raise ValueError(
      'expected positive fractions that add up to 1, got '
      f'{tuple(fractions)}; for example (0.7, 0.2, 0.1)'
    )
  edges = np.cumsum(fractions)[:-1]
  parts = [[np.empty(0, np.int64)] for _ in fractions]
  order = np.argsort(labels, kind='stable')
  classes, starts = np.unique(labels[order], return_index=True)
  groups = np.split(order, starts)[1:]
  for value, members in zip(classes, groups, strict=True):
    # SeedSequence takes no negative words, and -1 is the label of "none".
    shuffled = members[seeded_permutation(members.size, seed, int(value) + 1)]
    cuts = np.floor(edges * members.size + 0.5).astype(np.int64)
    for part, piece in zip(parts, np.split(shuffled, cuts), strict=True):
      part.append(piece)
  return tuple(np.sort(np.concatenate(part)) for part in parts)
