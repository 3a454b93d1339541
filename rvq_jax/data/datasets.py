"""Data sets by name: the one place that parses names.

tfds:NAME    a prepared TensorFlow Datasets directory (tfds_sources.py)
folder:PATH  PATH/{train,validation,test}/CLASS/* (folders.py)
photos       crops of scikit-image's photographs, embedded (photos.py)
"""

import dataclasses
import json
import logging
import os
from pathlib import Path

import numpy as np

from rvq_jax.data.decoding import MAX_SHARE
from rvq_jax.data.folders import open_folder, printable
from rvq_jax.data.sources import Selection, Source
from rvq_jax.data.splits import hashed_split, stratified_split
from rvq_jax.io import read_json, write_atomic

SPLITS = ('official', 'paper')
PARTS = ('train', 'validation', 'test')
SPLIT_FILE = 'split.json'
"""In a workdir: the names in each part of a folder that the run divided."""
_MAX_SPLIT_BYTES = 2**30
# The second names the embedded set beside a folder called photos.
_PHOTOS = ('photos', 'tfds:photos')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The parts to train on, to choose by and to report on, and a log line.

  `names` are those of the images in each part, where a folder was divided.
  """

  name: str
  train: Source
  validation: Source
  test: Source
  note: str = ''
  names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def write_split(self, path) -> None:
    """Writes the names of each part, for `open_dataset`; none: no file."""
    if self.names:
      content = {'data': self.name} | self.names
      write_atomic(path, json.dumps(content, indent=0))


def open_dataset(
  name: str, *, split: str = 'official', data_dir=None, split_file=None
) -> Dataset:
  """Opens a data set by name and divides it.

  Args:
    name: `tfds:NAME`, `folder:PATH` or `photos`.
    split: 'official' for the data set's own splits; 'paper' for 70-20-10 of
      all its labelled images, stratified by class.
    data_dir: where tfds keeps prepared data; None: ~/tensorflow_datasets.
    split_file: of `Dataset.write_split`, where a run divided this folder: if it
      exists, the parts are those, without images that are missing or new.

  Raises:
    ValueError: no such data set or split, or over 1 % of the images in
      `split_file` are missing.
  """
  if split not in SPLITS:
    raise ValueError(f'split: expected official or paper, got {split!r}')
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
  return _paper(name, splits, split_file)


def check_apart(name: str, workdir) -> None:
  """Refuses a workdir among the images of a folder, which its figures join."""
  kind, _, folder = name.partition(':')
  if kind == 'folder' and Path(workdir).resolve().is_relative_to(
    Path(folder).resolve()
  ):
    raise ValueError(
      f'expected a --workdir outside of the images in {folder}, got {workdir}'
    )


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
    if not os.path.exists(os.path.expanduser(name)):
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


def _paper(name: str, splits: dict[str, Source], split_file) -> Dataset:
  """Divides all labelled images 70-20-10, stratified by class (paper 4.1).

  Where no image has a label, all of them are one class. A folder is divided by
  its names, or as recorded.
  """
  labels = np.concatenate([source.labels for source in splits.values()])
  kept = np.flatnonzero(labels >= 0)
  if kept.size == 0:
    kept = np.arange(len(labels))
  files = recorded = None
  if name.startswith('folder:'):
    files = [file for source in splits.values() for file in source.identity()]
    recorded = _read_split(split_file, name)
  if recorded:
    parts = _recorded_parts(name, files, recorded)
  else:
    if kept.size < labels.size:
      count = labels.size - kept.size
      logging.info('%s: left out %d images that have no class', name, count)
    if files:
      keys = [key for source in splits.values() for key in source.keys]
      parts = hashed_split(labels[kept], [keys[i] for i in kept])
    else:
      parts = stratified_split(labels[kept])
    parts = [kept[part] for part in parts]
  if min(map(len, parts)) == 0:
    raise ValueError(
      f'{name} has {sum(map(len, parts))} images, too few to divide 70-20-10'
    )
  named = [[files[i] for i in part] for part in parts] if files else ()
  return Dataset(
    name,
    *(Selection(splits.values(), part) for part in parts),
    names=dict(zip(PARTS, named, strict=False)),
  )


def _read_split(path, name: str) -> dict[str, list[str]] | None:
  """The recorded names; None without a record of this data set."""
  if path is None or not Path(path).exists():
    return None
  found = read_json(path, _MAX_SPLIT_BYTES) or {}
  if any(not isinstance(found.get(part), list) for part in PARTS):
    raise ValueError(
      f'{path} is damaged; it says which images were trained on: put back a '
      'copy, or start anew in another --workdir'
    )
  return found if found.get('data') == name else None


def _recorded_parts(name, files, recorded) -> list[np.ndarray]:
  """Indices of the recorded images that are there."""
  index = {file: i for i, file in enumerate(files)}
  names = [file for part in PARTS for file in recorded[part]]
  missing = [file for file in names if file not in index]
  if len(missing) > MAX_SHARE * len(names):
    raise ValueError(
      f'{name}: {len(missing)} of the {len(names)} images that the run '
      f'divided are missing, over {MAX_SHARE:.0%}; put them back, such as '
      f'{printable(missing[0])}, or start anew in another --workdir'
    )
  new = len(files) - (len(names) - len(missing))
  for count, what in ((len(missing), 'missing'), (new, 'new')):
    if count:
      logging.warning(
        '%s: %s since the run divided it, and left out: %d of %d images',
        *(name, what, count, len(names)),
      )
  return [
    np.sort(
      np.array([index[f] for f in recorded[part] if f in index], np.int64)
    )
    for part in PARTS
  ]
