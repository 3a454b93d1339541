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
from rvq_jax.data.sources import SPLITS, Selection, Source
from rvq_jax.data.splits import hashed_split, stratified_split
from rvq_jax.io import read_json, write_atomic

SPLIT_FILE = 'split.json'
"""In a workdir: the names of the images in each split of a divided folder."""
_MAX_SPLIT_BYTES = 2**30
# With the prefix it is the embedded set even beside a folder called photos.
_PHOTOS = ('photos', 'tfds:photos')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits, a line for the log, and the names of a divided folder's images."""

  name: str
  train: Source
  validation: Source
  test: Source
  note: str = ''
  names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def write_split(self, path) -> None:
    """Writes `names`, if there are any, as `split_file` for `open_dataset`."""
    if self.names:
      write_atomic(path, json.dumps({'data': self.name} | self.names, indent=0))


def open_dataset(
  name: str, *, split: str = 'official', data_dir=None, split_file=None
) -> Dataset:
  """Opens the data set `tfds:NAME`, `folder:PATH` or `photos` and divides it.

  Args:
    split: 'official' for the data set's own splits; 'paper' for 70-20-10 of
      all its labelled images, stratified by class.
    data_dir: where tfds keeps prepared data; None: ~/tensorflow_datasets.
    split_file: from `Dataset.write_split`. If it exists, it gives the splits,
      without images missing or new now; over 1 % missing is a ValueError.
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
  if split == 'official':
    return _official(name, sources)
  return _paper(name, list(sources.values()), split_file)


def check_apart(name: str, output, flag: str = '--workdir') -> None:
  """Refuses an output among the images of a folder: its figures would be read.

  `name` is as for `open_dataset`, `flag` the flag of the output.
  """
  kind, _, path = name.partition(':')
  folder = Path(os.path.expanduser(path)).resolve()
  inside = Path(output).resolve().is_relative_to(folder)
  if kind == 'folder' and folder.is_dir() and inside:
    raise ValueError(
      f'expected {flag} outside of the images in {path}, got {output}'
    )


def full_name(name: str) -> str:
  """The name for `open_dataset` of images as `open_images` takes them."""
  if name == 'photos' and Path(name).exists():
    return 'folder:photos'
  if name in _PHOTOS or name.startswith(('tfds:', 'folder:')):
    return name
  return f'folder:{name}'


def open_images(name: str, *, data_dir=None, split=None) -> dict[str, Source]:
  """Opens all images, or one split; returns Source by split ('all' without).

  `name` is an image, a folder, or a name for `open_dataset`. 'photos' means a
  folder of this name if there is one; 'tfds:photos' is the embedded set.
  """
  full = full_name(name)
  if full == 'folder:photos' != name:
    logging.info('photos is the folder ./photos; tfds:photos is the data set')
  elif full != name and not os.path.exists(os.path.expanduser(name)):
    raise ValueError(
      f'there is no {name}: expected an image, a folder, tfds:NAME or photos'
    )
  sources = _open(full, data_dir)
  if split not in (None, *sources):
    raise ValueError(
      f'split: expected one of {", ".join(sources)} of {name}, got {split!r}'
    )
  return {split: sources[split]} if split else sources


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


def _official(name: str, sources: dict[str, Source]) -> Dataset:
  """Uses the data set's own splits; one held-out split may serve as two."""
  held_out = [s for s in ('validation', 'test') if s in sources]
  if 'train' not in sources or not held_out:
    splits = ', '.join(s for s in sources if s != 'all') or 'no split folders'
    raise ValueError(
      f'{name}: expected the splits train and one of validation and test, got '
      f'{splits}; pass --config.data.split=paper to divide all images 70-20-10'
    )
  used = [sources[split] for split in ('train', held_out[0], held_out[-1])]
  note = f'{name}: validation and test are both its {held_out[0]} split'
  return Dataset(name, *used, note=note if len(held_out) == 1 else '')


def _paper(name: str, sources: list[Source], split_file) -> Dataset:
  """Divides all labelled images 70-20-10, a folder by names or as recorded."""
  files, parts = [], None
  if name.startswith('folder:'):
    files = [file for source in sources for file in source.identity()]
    parts = _recorded_parts(name, files, split_file)
  parts = parts or _divide(name, sources, by_name=bool(files))
  if min(map(len, parts)) == 0:
    raise ValueError(
      f'{name} has {sum(map(len, parts))} images, too few to divide 70-20-10'
    )
  named = zip(SPLITS, parts, strict=True) if files else ()
  names = {split: [files[i] for i in part] for split, part in named}
  return Dataset(name, *(Selection(sources, p) for p in parts), names=names)


def _divide(name: str, sources: list[Source], by_name: bool):
  """Divides by class (paper 4.1); without any label, all are one class."""
  labels = np.concatenate([source.labels for source in sources])
  kept = np.flatnonzero((labels >= 0) | (labels.max(initial=-1) < 0))
  if count := labels.size - kept.size:
    logging.info('%s: left out %d images that have no class', name, count)
  if by_name:
    keys = [key for source in sources for key in source.keys]
    parts = hashed_split(labels[kept], [keys[i] for i in kept])
  else:
    parts = stratified_split(labels[kept])
  return [kept[part] for part in parts]


def _recorded_parts(name, files, path) -> list[np.ndarray] | None:
  """Sorted indices of the recorded images that still exist; None: no record."""
  if path is None or not Path(path).exists():
    return None
  recorded = read_json(path, _MAX_SPLIT_BYTES) or {}
  if any(not isinstance(recorded.get(split), list) for split in SPLITS):
    raise ValueError(
      f'{path} is damaged; it says which images were trained on: put back a '
      'copy, or start anew in another --workdir'
    )
  if recorded.get('data') != name:
    return None
  index = {file: i for i, file in enumerate(files)}
  names = [file for split in SPLITS for file in recorded[split]]
  missing = [file for file in names if file not in index]
  if len(missing) > MAX_SHARE * len(names):
    raise ValueError(
      f'{name}: {len(missing)} of the {len(names)} images that the run '
      f'divided are missing, over {MAX_SHARE:.0%}; put them back, such as '
      f'{printable(missing[0])}, or start anew in another --workdir'
    )
  new = len(files) - (len(names) - len(missing))
  for count, change in ((len(missing), 'missing'), (new, 'new')):
    if count:
      logging.warning(
        '%s: %s since the run divided it, and left out: %d of %d images',
        *(name, change, count, len(names)),
      )
  parts = ([index[f] for f in recorded[s] if f in index] for s in SPLITS)
  return [np.array(sorted(part), np.int64) for part in parts]
