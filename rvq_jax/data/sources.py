"""Sources of images: random access to encoded images."""

import functools
from typing import NamedTuple

import numpy as np

SPLITS = ('train', 'validation', 'test')
KINDS = ('folder:', 'wds:', 'parquet:', 'hf:')
"""Kinds whose splits a run records: it may divide them, and they may change."""


class Record(NamedTuple):
  """An encoded image, its class (-1: none) and its name for the log."""

  image: bytes
  label: int
  name: str


class Source:
  """Random access to `len(source)` encoded images; picklable, for workers.

  `source[i]` reads a `Record` or raises an OSError. `labels` are int32 [n].
  `set_size` counts the images of the whole data set.
  """

  labels: np.ndarray
  set_size: int | None = None  # None: this is the whole

  def identity(self) -> list[str] | None:
    """Names that differ if the records do; None if unknown."""
    return None

  def stamps(self) -> np.ndarray | None:
    """Numbers that change with the records' bytes: int64 [n, 2], or None."""
    return None

  def subset(self, indices: np.ndarray) -> 'Source':
    """Returns the records at `indices`, in that order, as a source."""
    return Selection([self], indices)

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index) -> Record:
    raise NotImplementedError

  def __iter__(self):
    return (self[i] for i in range(len(self)))


class Selection(Source):
  """Chosen records of several sources; indices run through all sources."""

  def __init__(self, sources: list[Source], indices: np.ndarray):
    self._sources = sources
    self._ends = np.cumsum([len(source) for source in self._sources])
    self._indices = np.asarray(indices, np.int64)
    self.set_size = sources[0].set_size or int(self._ends[-1])

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    index = self._indices[index]
    number = int(np.searchsorted(self._ends, index, side='right'))
    source = self._sources[number]
    return source[int(index - self._ends[number]) + len(source)]

  @functools.cached_property
  def labels(self):
    """See `Source`."""
    labels = [source.labels for source in self._sources]
    return np.concatenate(labels)[self._indices]
