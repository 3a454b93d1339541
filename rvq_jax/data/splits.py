"""Seeded permutations and the stratified split of the paper (section 4.1).

They are built from the raw words of NumPy's Philox generator, which NumPy
promises for ever and on every platform, unlike `Generator.permutation`.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

FRACTIONS = (0.7, 0.2, 0.1)  # train, validation and test in the paper


def seeded_permutation(n: int, *entropy: int) -> np.ndarray:
  """Returns a permutation of range(n), int64 [n], the same on every machine.

  It depends on `entropy`, non-negative integers such as a seed and an epoch.
  """
  words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
  return np.argsort(words, kind='stable')


def seeded_rng(*entropy: int) -> np.random.Generator:
  """Returns the Philox generator that belongs to non-negative integers."""
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def hashed_order(split: str, keys: Iterable[str | int]) -> list[int]:
  """Returns tfds's order of records: by MD5 of the split's name and the key."""
  hashes = [hashlib.md5(f'{split}{key}'.encode()).digest() for key in keys]
  return sorted(range(len(hashes)), key=hashes.__getitem__)


def stratified_split(labels: np.ndarray, seed: int = 0) -> list[np.ndarray]:
  """Splits indices so that every part holds the same share of each class.

  Each class is permuted on its own and cut at the rounded cumulative
  fractions, so a part has within one image of its share of every class.

  Args:
    labels: integers [n], at least -1; any value is a class.
    seed: non-negative integer.

  Returns: the sorted int64 indices of train, validation and test.
  """
  edges = np.cumsum(FRACTIONS)[:-1]
  parts = [[np.empty(0, np.int64)] for _ in FRACTIONS]
  order = np.argsort(labels, kind='stable')
  classes, starts = np.unique(labels[order], return_index=True)
  for value, members in zip(classes, np.split(order, starts)[1:], strict=True):
    # SeedSequence takes no negative words, and -1 is the label of "none".
    shuffled = members[seeded_permutation(members.size, seed, int(value) + 1)]
    cuts = np.floor(edges * members.size + 0.5).astype(np.int64)
    for part, piece in zip(parts, np.split(shuffled, cuts), strict=True):
      part.append(piece)
  return [np.sort(np.concatenate(part)) for part in parts]


def hashed_split(
  classes: Sequence[str], keys: Sequence[str]
) -> list[np.ndarray]:
  """Splits by name, so that few images move where few files change.

  Classes in sorted order, each ordered by SHA-256 of the key, are laid end to
  end; a class that ends at image C of that row is cut so that the classes up to
  it have round(0.7 C) training images and round(0.9 C) of training and
  validation. So the shares hold over the whole set, and a part has within one
  image of its share of every class.

  Args:
    classes: of each image.
    keys: names of the images, such as CLASS/NAME.

  Returns: the sorted int64 indices of train, validation and test.
  """
  members: dict[str, list[int]] = {name: [] for name in sorted({*classes})}
  for index, name in enumerate(classes):
    members[name].append(index)
  hashes = [
    hashlib.sha256(key.encode('utf-8', 'surrogateescape')).digest()
    for key in keys
  ]
  parts, end = ([], [], []), 0
  for indices in members.values():
    indices.sort(key=hashes.__getitem__)
    start, end = end, end + len(indices)
    # Rounded in integers: the same on every machine.
    one, two = ((s * end + 5) // 10 - (s * start + 5) // 10 for s in (7, 9))
    for part, piece in zip(
      parts, (indices[:one], indices[one:two], indices[two:]), strict=True
    ):
      part += piece
  return [np.sort(np.array(part, np.int64)) for part in parts]
