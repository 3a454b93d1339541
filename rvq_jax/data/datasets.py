"""Data sets by name: the one place that parses names.

tfds:NAME    a prepared TensorFlow Datasets directory (tfds_sources.py)
folder:PATH  PATH/{train,validation,test}/CLASS/* (folders.py)
photos       crops of scikit-image's photographs, embedded (photos.py)
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from rvq_jax.data.sources import Selection, Source
from rvq_jax.data.splits import stratified_split

SPLITS = ('official', 'paper')
# The second names the embedded set beside a folder called photos.
_PHOTOS = ('photos', 'tfds:photos')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The parts to train on, to choose by and to report on, and a log line."""

  name: str
  train: Source
  validation: Source
  test: Source
  note: str = ''


def open_dataset(
  name: str, *, split: str = 'official', data_dir=None, seed: int = 0
) -> Dataset:
  """Opens a data set by name and divides it.

  Args:
    name: `tfds:NAME`, `folder:PATH` or `photos`.
    split: 'official' for the data set's own splits; 'paper' for 70-20-10 of
      all its labelled images, stratified by class.
    data_dir: where tfds keeps prepared data; None: ~/tensorflow_datasets.
    seed: of the paper split.
  """
  if split not in SPLITS:
    raise ValueError(f'expected split to be one of {SPLITS}, got {split!r}')
  if name in _PHOTOS and split == 'paper':
    raise ValueError(
      'photos: expected --config.data.split=official (train and test are crops '
      'of different photographs), got paper'
    )
  splits = _open(name, data_dir)
  # By convention: the labels of ImageNet's test split are not public.
  if name.startswith('tfds:imagenet2012'):
    splits.pop('test', None)
  if split == 'official':
    return _official(name, splits)
  return _paper(name, splits, seed)


def open_images(
  name: str, *, data_dir=None, split: str | None = None
) -> dict[str, Source]:
  """Opens all images of something that a user named.

  Args:
    name: an image, a folder, or what `open_dataset` takes. A folder called
      photos takes precedence over the embedded set, then 'tfds:photos'.
    data_dir: where tfds keeps prepared data.
    split: the one to open; None for each that there is.

  Returns:
    Source by split; 'all' where there are no splits.
  """
  full = name
  if name == 'photos' and Path(name).exists():
    logging.info('photos is the folder ./photos; tfds:photos is the data set')
    full = 'folder:photos'
  elif name not in _PHOTOS and not name.startswith(('tfds:', 'folder:')):
    if not Path(name).expanduser().exists():
      raise ValueError(
        f'there is no {name}: expected an image, a folder, tfds:NAME or photos'
      )
    full = f'folder:{name}'
  splits = _open(full, data_dir)
  if split not in (None, *splits):
    raise ValueError(
      f'split: expected one of {", ".join(splits)} of {name}, got {split!r}'
    )
  return {split: splits[split]} if split else splits


def _open(name: str, data_dir: str | None) -> dict[str, Source]:
  """Opens the splits of a data set; tfds and skimage are slow to import."""
  kind, _, rest = name.partition(':')
  if name in _PHOTOS:
    from rvq_jax.data.photos import PhotoSource

    return {split: PhotoSource(split) for split in ('train', 'test')}
  if kind == 'folder' and rest:
    from rvq_jax.data.folders import open_folder

    return open_folder(rest)
  if kind == 'tfds' and rest:
    from rvq_jax.data.tfds_sources import open_tfds

    return open_tfds(rest, data_dir=data_dir)
  raise ValueError(
    f'expected data set tfds:NAME | folder:PATH | photos, got {name!r}'
  )


def _official(name: str, splits: dict[str, Source]) -> Dataset:
  """Uses the data set's own splits; one held-out split may serve as two."""
  held_out = [s for s in ('validation', 'test') if s in splits]
  if 'train' not in splits or not held_out:
    found = ', '.join(s for s in splits if s != 'all') or 'no split folders'
    raise ValueError(
      f'{name}: expected the splits train and one of validation and test, got '
      f'{found}; pass --config.data.split=paper to divide all images 70-20-10'
    )
  note = f'{name}: validation and test are both its {held_out[0]} split'
  return Dataset(
    name,
    *(splits[split] for split in ('train', held_out[0], held_out[-1])),
    note=note if len(held_out) == 1 else '',
  )


def _paper(name: str, splits: dict[str, Source], seed: int) -> Dataset:
  """Divides all labelled images 70-20-10, stratified by class (paper 4.1).

  Where no image has a label, all of them are one class.
  """
  labels = np.concatenate([source.labels for source in splits.values()])
  kept = np.flatnonzero(labels >= 0)
  if kept.size == 0:
    kept = np.arange(len(labels))
  parts = [kept[part] for part in stratified_split(labels[kept], seed)]
  if min(map(len, parts)) == 0:
    raise ValueError(
      f'{name} has {len(kept)} images, too few to divide 70-20-10; expected '
      'several of each class'
    )
  return Dataset(name, *(Selection(splits.values(), part) for part in parts))
