"""Data sets by name: `open_dataset` opens one and divides it."""

import dataclasses
from pathlib import Path

import numpy as np

from rvq_jax.data.sources import Source, Union
from rvq_jax.data.splits import stratified_split

KINDS = ('tfds:NAME', 'folder:PATH', 'photos')
SPLITS = ('official', 'paper')


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
  # Imported here: tfds takes a second to load.
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


def open_images(
  name: str, *, data_dir: str | None = None, split: str | None = None
) -> dict[str, Source]:
  """Opens images by name, undivided.

  Args:
    name: an existing folder, `folder:PATH`, `tfds:NAME` or `photos`.
    data_dir: where tfds keeps prepared data.
    split: the one to open; None for all of them.

  Returns:
    Source by split; 'all' where there are no splits.

  Raises:
    ValueError: there is no such folder, data set or split.
  """
  kind, _, rest = name.partition(':')
  if not Path(name).is_dir() and (kind == 'tfds' or name == 'photos'):
    from rvq_jax.data.tfds_sources import open_tfds

    splits = open_tfds(rest or name, data_dir=data_dir)
  else:
    from rvq_jax.data.folders import open_folder

    splits = open_folder(rest if kind == 'folder' else name)
  if split and split not in splits:
    raise ValueError(
      f'split: expected one of {", ".join(splits)} of {name}, got {split!r}'
    )
  return {split: splits[split]} if split else splits


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
