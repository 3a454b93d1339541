"""Where images come from: one interface, and `open_dataset` to get at it.

A `Source` gives random access to encoded images. Three kinds of data set
open to three sources, for training, validation and test:

  tfds:NAME    a prepared TensorFlow Datasets directory (tfds_sources.py)
  folder:PATH  PATH/{train,validation,test}/CLASS/* (folders.py)
  photos       crops of scikit-image's photographs, embedded (photos.py)
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rvq_jax.data.splits import stratified_split

KINDS = ('tfds:NAME', 'folder:PATH', 'photos')
SPLITS = ('official', 'paper')


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
    """Reads one record.

    Raises:
      OSError: if it cannot be read; the loaders then skip it.
    """

  @property
  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """The labels, int32 [n], read once and without decoding images."""

  def identity(self) -> list[str] | None:
    """Names that differ where the records do; None where none are known."""
    return None

  def __iter__(self):
    return (self[i] for i in range(len(self)))

  def subset(self, indices: np.ndarray) -> 'Source':
    """Returns the records at `indices`, in that order, as a source."""
    return Subset(self, indices)


class Subset(Source):
  """Some records of another source."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source = source
    self._indices = np.asarray(indices, np.int64)
    self._indices.setflags(write=False)

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    return self._source[int(self._indices[index])]

  @property
  def labels(self):
    """The labels, int32 [n]."""
    return self._source.labels[self._indices]

  def __repr__(self):
    return f'Subset({self._source!r}, n={len(self)})'


class Union(Source):
  """Several sources one after the other."""

  def __init__(self, sources: Sequence[Source]):
    self._sources = tuple(sources)
    self._ends = np.cumsum([len(source) for source in self._sources])

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    which = int(np.searchsorted(self._ends, index, side='right'))
    if index < 0 or which == len(self._sources):
      raise IndexError(f'expected an index below {len(self)}, got {index}')
    source = self._sources[which]
    return source[int(index - self._ends[which] + len(source))]

  @property
  def labels(self):
    """The labels, int32 [n]."""
    return np.concatenate([source.labels for source in self._sources])

  def __repr__(self):
    return f'Union({", ".join(map(repr, self._sources))})'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The three parts of a data set.

  Attributes:
    name: as given to `open_dataset`.
    train: images to train on.
    validation: images to choose by.
    test: images to report on.
    note: a line for the log where something must be said, else ''.
  """

  name: str
  train: Source
  validation: Source
  test: Source
  note: str = ''


def open_dataset(
  name: str,
  *,
  split: str = 'official',
  data_dir: str | None = None,
  seed: int = 0,
) -> Dataset:
  """Opens a data set by name and divides it.

  Args:
    name: `tfds:NAME`, `folder:PATH` or `photos`.
    split: 'official' for the data set's own splits; 'paper' for 70-20-10 of
      all its labelled images, stratified by class.
    data_dir: where tfds keeps prepared data; None for its default,
      ~/tensorflow_datasets.
    seed: of the paper split.

  Returns:
    A `Dataset`.

  Raises:
    ValueError: if there is no such data set or split, or files are missing;
      the message says which, and where to put them.
  """
  kind, colon, rest = name.partition(':')
  if split not in SPLITS:
    raise ValueError(f'expected split to be one of {SPLITS}, got {split!r}')
  # Imported here: they import this module, and tfds takes a second to load.
  if kind == 'folder' and rest:
    from rvq_jax.data.folders import open_folder

    splits = open_folder(rest)
  elif (kind == 'tfds' and rest) or (kind == 'photos' and not colon):
    if kind == 'photos' and split == 'paper':
      raise ValueError(
        'photos has only the split official: its train and test images are '
        'crops of different photographs; pass --config.data.split=official'
      )
    from rvq_jax.data.tfds_sources import open_tfds

    splits = open_tfds(rest or kind, data_dir=data_dir)
  else:
    raise ValueError(f'expected data set {" | ".join(KINDS)}, got {name!r}')
  # The labels of ImageNet's test split are not public: by convention the
  # validation split is the one that is reported on.
  if kind == 'tfds' and rest.startswith('imagenet2012'):
    splits.pop('test', None)
  make = _paper if split == 'paper' else _official
  return make(name, splits, seed)


def _official(name: str, splits: dict[str, Source], seed: int) -> Dataset:
  """Uses the data set's own splits; one held-out split may serve as two."""
  del seed
  validation = splits.get('validation')
  test = splits.get('test')
  if 'train' not in splits or (validation is None and test is None):
    raise ValueError(
      f'{name} has {_listed(splits)}, and its official split needs train and '
      'one of validation and test; pass --config.data.split=paper to divide '
      'all its images 70-20-10'
    )
  note = ''
  if validation is None or test is None:
    only = 'test' if validation is None else 'validation'
    note = f'{name}: validation and test are both its {only} split'
  return Dataset(
    name,
    train=splits['train'],
    validation=test if validation is None else validation,
    test=validation if test is None else test,
    note=note,
  )


def _paper(name: str, splits: dict[str, Source], seed: int) -> Dataset:
  """Divides all labelled images 70-20-10, stratified by class (paper 4.1).

  Where no image has a label, all of them are one class.
  """
  everything = Union(list(splits.values()))
  labels = everything.labels
  kept = np.flatnonzero(labels >= 0)
  if kept.size == 0:
    kept = np.arange(len(everything))
  parts = [kept[part] for part in stratified_split(labels[kept], seed=seed)]
  if min(map(len, parts)) == 0:
    raise ValueError(
      f'{name} has {len(kept)} images, too few to divide 70-20-10; expected '
      'several of each class'
    )
  train, validation, test = (everything.subset(part) for part in parts)
  return Dataset(name, train, validation, test)


def _listed(splits: dict[str, Source]) -> str:
  """Says which splits there are."""
  if list(splits) == ['all']:
    return 'no split folders'
  return f'the splits {", ".join(splits)}'
