"""Opens data sets by name; only this module parses names.

tfds:NAME        a prepared TensorFlow Datasets directory (tfds_sources.py)
folder:PATH      PATH/{train,validation,test}/CLASS/* (folders.py)
wds:PATTERN      tars as WebDataset's (shards.py, tars.py)
parquet:PATTERN  Parquet files (shards.py, tables.py)
hf:OWNER/NAME    a data set of the Hub, or a folder of save_to_disk (tables.py)
photos           crops of scikit-image's photographs, embedded (photos.py)
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rvq_jax.data.decoding import MAX_SHARE
from rvq_jax.data.folders import inode, open_folder, printable
from rvq_jax.data.sources import KINDS, SPLITS, Selection, Source
from rvq_jax.data.splits import hashed_split, stratified_split
from rvq_jax.io import read_json, write_atomic

SPLIT_FILE = 'split.json'
"""In a workdir: identifies images of `KINDS`, even if their folder moved.

Digests of some images and, if the run divided them, the names in each split.
"""
_MAX_SPLIT_BYTES = 2**30
_DIGESTS = 48  # images of each split
# The prefix means the embedded set even beside a folder called photos.
_PHOTOS = ('photos', 'tfds:photos')
_EXPECTED = 'tfds:NAME | wds:PATTERN | parquet:PATTERN | hf:OWNER/NAME | photos'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits and a line for the log; for `KINDS` also the names per split."""

  name: str
  train: Source
  validation: Source
  test: Source
  note: str = ''
  names: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  divided: bool = False

  def write_split(self, path) -> None:
    """Writes `split_file` for `open_dataset`, if the kind is in `KINDS`."""
    digests = {}
    for split, names in self.names.items():
      source = getattr(self, split)
      for i in range(0, len(names), -(-len(names) // _DIGESTS)):
        digests[names[i]] = _digest(source, i)
    if self.names:
      record = {'data': self.name, 'digests': digests}
      record |= self.names if self.divided else {}
      write_atomic(path, json.dumps(record, indent=0))


def open_dataset(
  name: str, *, split: str = 'official', data_dir=None, split_file=None
) -> Dataset:
  """Opens a data set by its name, see above, and divides it.

  Args:
    split: 'official' for the data set's own splits; 'paper' for 70-20-10 of
      all its labelled images, stratified by class.
    data_dir: folder of prepared tfds data; None: ~/tensorflow_datasets.
    split_file: from `Dataset.write_split`. If it exists, it defines the splits,
      without images that are missing or new. Over 1 % missing or changed is a
      ValueError; the folder may have moved.
  """
  if split not in ('official', 'paper'):
    raise ValueError(f'split: expected official or paper, got {split!r}')
  if name in _PHOTOS and split == 'paper':
    raise ValueError(
      'photos: expected --config.data.split=official (train and test are crops '
      'of different photographs), got paper'
    )
  sources = _open(name, data_dir)
  # By convention: the labels of ImageNet's test split are not public.
  if name.startswith('tfds:imagenet2012'):
    sources.pop('test', None)
  record = None
  if name.startswith(KINDS) and split_file and Path(split_file).exists():
    record = _read_record(split_file, sources, name)
  if split == 'official':
    return _official(name, sources)
  return _paper(name, list(sources.values()), record)


def check_apart(name: str, output, flag: str = '--workdir') -> None:
  """Refuses an output inside a folder of images, which would gain its figures.

  `name` is as for `open_dataset`, `flag` the flag of the output.
  """
  kind, _, path = name.partition(':')
  folder = Path(os.path.expanduser(path)).resolve()
  inside = Path(output).resolve().is_relative_to(folder)
  if kind == 'folder' and folder.is_dir() and inside:
    raise ValueError(
      f'expected {flag} outside the images in {path}, got {output}'
    )


def full_name(name: str) -> str:
  """The name for `open_dataset` of a name for `open_images`."""
  if name == 'photos' and Path(name).exists():
    return 'folder:photos'
  if name in _PHOTOS or name.startswith(('tfds:', *KINDS)):
    return name
  return f'folder:{name}'


def open_images(name: str, *, data_dir=None, split=None) -> dict[str, Source]:
  """Opens all images, or one split; returns Source by split ('all' if none).

  `name` is an image, a folder, or a name for `open_dataset`. 'photos' means a
  folder of this name if it exists; 'tfds:photos' is the embedded set.
  """
  full = full_name(name)
  if full == 'folder:photos' != name:
    logging.info('photos is the folder ./photos; tfds:photos is the data set')
  elif full != name and not os.path.exists(os.path.expanduser(name)):
    raise ValueError(
      f'there is no {name}: expected an image, a folder, {_EXPECTED}'
    )
  sources = _open(full, data_dir)
  if split not in (None, *sources):
    raise ValueError(
      f'split: expected one of {", ".join(sources)} of {name}, got {split!r}'
    )
  return {split: sources[split]} if split else sources


def _open(name: str, data_dir: str | None) -> dict[str, Source]:
  """Opens the splits of a data set, and tells each the size of the whole."""
  sources = _open_splits(name, data_dir)
  for source in sources.values():
    source.set_size = sum(map(len, sources.values()))
  return sources


def _open_splits(name: str, data_dir: str | None) -> dict[str, Source]:
  kind, _, rest = name.partition(':')
  if name in _PHOTOS:
    # Slow to import, like tfds.
    from rvq_jax.data.photos import PhotoSource

    return {split: PhotoSource(split) for split in ('train', 'test')}
  if kind == 'folder' and rest:
    return open_folder(rest)
  if kind == 'tfds' and rest:
    from rvq_jax.data.tfds_sources import open_tfds

    return open_tfds(rest, data_dir=data_dir)
  if kind in ('wds', 'parquet') and rest:
    from rvq_jax.data import shards, tables, tars

    open_files = tars.open_tars if kind == 'wds' else tables.open_tables
    return open_files(shards.find_files(kind, rest))
  if kind == 'hf' and rest:
    from rvq_jax.data.tables import open_hub

    return open_hub(rest)
  raise ValueError(f'expected data set folder:PATH | {_EXPECTED}, got {name!r}')


def _official(name: str, sources: dict[str, Source]) -> Dataset:
  """Uses the data set's own splits; one held-out split may serve as two."""
  held_out = [s for s in ('validation', 'test') if s in sources]
  if 'train' not in sources or not held_out:
    splits = ', '.join(s for s in sources if s != 'all') or 'no split folders'
    raise ValueError(
      f'{name}: expected the splits train and one of validation and test, got '
      f'{splits}; set --config.data.split=paper to divide all images 70-20-10'
    )
  used = [sources[split] for split in ('train', held_out[0], held_out[-1])]
  note = f'{name}: validation and test are both its {held_out[0]} split'
  note = note if len(held_out) == 1 else ''
  own = name.startswith(KINDS)
  names = [source.identity() for source in used] if own else ()
  names = dict(zip(SPLITS, names, strict=True)) if own else {}
  return Dataset(name, *used, note=note, names=names)


def _paper(name: str, sources: list[Source], record) -> Dataset:
  """Divides all labelled images 70-20-10; `KINDS` by names or as recorded."""
  files, parts = [], None
  if name.startswith(KINDS):
    files = [file for source in sources for file in source.identity()]
    parts = record and _recorded_parts(name, sources, files, record)
  parts = parts or _divide(name, sources, by_name=bool(files))
  if min(map(len, parts)) == 0:
    raise ValueError(
      f'{name} has {sum(map(len, parts))} images, too few to divide 70-20-10'
    )
  named = zip(SPLITS, parts, strict=True) if files else ()
  names = {split: [files[i] for i in part] for split, part in named}
  parts = (Selection(sources, part) for part in parts)
  return Dataset(name, *parts, names=names, divided=bool(names))


def _divide(name: str, sources: list[Source], by_name: bool):
  """Divides by class (paper 4.1); without labels, all images are one class."""
  labels = np.concatenate([source.labels for source in sources])
  kept = np.flatnonzero((labels >= 0) | (labels.max(initial=-1) < 0))
  if count := labels.size - kept.size:
    logging.info('%s: skipped %d images without a class', name, count)
  if by_name:
    if hasattr(sources[0], 'inodes'):
      # Splits may share files: the first name of each decides.
      inodes = np.concatenate([source.inodes for source in sources])
      first = np.unique(inodes, axis=0, return_index=True)[1]
      kept = np.intersect1d(kept, first)
    keys = [key for source in sources for key in source.keys]
    parts = hashed_split(labels[kept], [keys[i] for i in kept])
  else:
    parts = stratified_split(labels[kept])
  return [kept[part] for part in parts]


def _digest(source: Source, index: int) -> str:
  try:
    return hashlib.sha256(source[index].image).hexdigest()
  except OSError:
    return 'cannot be read'


def _read_record(path, sources, name) -> dict:
  """The content of `split_file`, after a comparison of some images."""
  record = read_json(path, _MAX_SPLIT_BYTES) or {}
  # Earlier versions wrote no digests.
  digests = record.get('digests', {})
  divided = all(isinstance(record.get(split), list) for split in SPLITS)
  if not isinstance(digests, dict) or not (digests or divided):
    raise ValueError(
      f'{path} is damaged; it lists the training images: restore a copy, or '
      'start a new run in another --workdir'
    )
  now = {
    file: _digest(source, i)
    for source in sources.values()
    for i, file in enumerate(source.identity())
    if file in digests
  }
  if divided:  # `_recorded_parts` counts the missing ones
    now = digests | now
  changed = [file for file in digests if now.get(file) != digests[file]]
  if len(changed) > max(1, MAX_SHARE * len(digests)):
    raise ValueError(
      f'{name}: {len(changed)} of {len(digests)} images of the run are missing '
      f'or changed, such as {printable(changed[0])}; restore them, or start a '
      'new run in another --workdir'
    )
  return record if divided else {}


def _recorded_parts(name, sources, files, recorded) -> list[np.ndarray]:
  """Sorted indices of the recorded images that still exist."""
  index = {file: i for i, file in enumerate(files)}
  names = [file for split in SPLITS for file in recorded[split]]
  missing = [file for file in names if file not in index]
  if missing and name.startswith('folder:'):  # some may be further names
    rows = itertools.chain(*(source.inodes.tolist() for source in sources))
    row = {tuple(number): i for i, number in enumerate(rows)}
    for file in missing:
      with contextlib.suppress(OSError, KeyError):
        index[file] = row[inode(os.path.join(sources[0].root, file))]
    missing = [file for file in missing if file not in index]
  if len(missing) > MAX_SHARE * len(names):
    raise ValueError(
      f'{name}: {len(missing)} of the {len(names)} images of the run are '
      f'missing, over {MAX_SHARE:.0%}, such as {printable(missing[0])}; '
      'restore them, or start a new run in another --workdir'
    )
  new = len(files) - (len(names) - len(missing))
  for count, change in ((len(missing), 'missing'), (new, 'new')):
    if count:
      logging.warning(
        '%s: %s since the start of the run, and skipped: %d of %d images',
        *(name, change, count, len(names)),
      )
  parts = ([index[f] for f in recorded[s] if f in index] for s in SPLITS)
  return [np.array(sorted(part), np.int64) for part in parts]
