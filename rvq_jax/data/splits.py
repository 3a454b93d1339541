"""The paper's stratified split (section 4.1), and orders by hashes."""

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from rvq_jax.data.loaders import seeded_permutation

FRACTIONS = (0.7, 0.2, 0.1)  # train, validation and test in the paper


def seeded_rng(*entropy: int) -> np.random.Generator:
  """Returns a Philox generator seeded by non-negative integers."""
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def hashed_order(split: str, keys: Iterable[str | int]) -> list[int]:
  """Returns tfds's order of records: by MD5 of the split's name and the key."""
  hashes = [hashlib.md5(f'{split}{key}'.encode()).digest() for key in keys]
  return sorted(range(len(hashes)), key=hashes.__getitem__)


def stratified_split(labels: np.ndarray) -> list[np.ndarray]:
  """Splits indices: each part has its share of every class, within one image.

  A fixed seed permutes each class; the rounded cumulative fractions cut it.
  `labels` are integers [n]; any value is a class.
  Returns the sorted int64 indices of train, validation and test.
  """
  edges = np.cumsum(FRACTIONS)[:-1]
  order = np.argsort(labels, kind='stable')
  pieces = [[order[:0]] * len(FRACTIONS)]
  classes, starts = np.unique(labels[order], return_index=True)
  for value, members in zip(classes, np.split(order, starts)[1:], strict=True):
    # SeedSequence takes no negative words, and -1 labels images without class.
    word = (int(value) + 1) % 2**64
    shuffled = members[seeded_permutation(members.size, 0, word)]
    cuts = np.floor(edges * members.size + 0.5).astype(np.int64)
    pieces.append(np.split(shuffled, cuts))
  return [np.sort(np.concatenate(part)) for part in zip(*pieces, strict=True)]


def hashed_split(labels: np.ndarray, keys: Sequence[str]) -> list[np.ndarray]:
  """Splits by name: 70-20-10 over the whole set, classes as even as possible.

  The SHA-256 of its keys (CLASS/NAME) orders each class. The first C images, up
  to the end of any of the sorted classes, hold round(0.7 C) training images and
  round(0.9 C) training and validation images.
  """
  hashes = [hashlib.sha256(os.fsencode(key)).digest() for key in keys]
  order = sorted(range(len(keys)), key=lambda i: (labels[i], hashes[i]))
  ends = np.cumsum(np.unique(labels, return_counts=True)[1])
  # Rounding in integers is the same on every machine.
  edges = np.append(0, ends)
  cuts = np.diff([(share * edges + 5) // 10 for share in (7, 9)]).T
  pieces = map(np.split, np.split(np.array(order, np.int64), ends[:-1]), cuts)
  return [np.sort(np.concatenate(part)) for part in zip(*pieces, strict=True)]
