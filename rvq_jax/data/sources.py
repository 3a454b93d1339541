"""Where images come from: random access to encoded images."""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
  """One image as it is stored.

  Attributes:
    image: the encoded bytes.
    label: the class, -1 where there is none.
    name: what to call the image in a log.
  """

  image: bytes
  label: int
  name: str


class Source(abc.ABC):
  """Random access to encoded images; picklable, for worker processes."""

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of records."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Reads one record; raises OSError if it cannot be read."""

  @property
  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """The labels, int32 [n], read once and without decoding images."""

  def identity(self) -> list[str] | None:
    """Names that differ where the records do; None where none are known."""
    return None

  def subset(self, indices: np.ndarray) -> 'Source':
    """Returns the records at `indices`, in that order, as a source."""
    return Subset(self, indices)

  def __iter__(self):
    return (self[i] for i in range(len(self)))


class Subset(Source):
  """Some records of another source."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, np.asarray(indices, np.int64)

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    return self._source[int(self._indices[index])]

  @property
  def labels(self):
    """The labels, int32 [n]."""
    return self._source.labels[self._indices]


class Union(Source):
  """Several sources one after the other."""

  def __init__(self, sources: Sequence[Source]):
    self._sources = tuple(sources)
    self._ends = np.cumsum([len(source) for source in self._sources])

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    which = int(np.searchsorted(self._ends, index, side='right'))
    source = self._sources[which]
    return source[int(index - self._ends[which] + len(source))]

  @property
  def labels(self):
    """The labels, int32 [n]."""
    return np.concatenate([source.labels for source in self._sources])
