"""Prepared TensorFlow Datasets directories, read without TensorFlow."""

import contextlib
import functools
import io
import logging
import os

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from rvq_jax.data import prepare
from rvq_jax.data.sources import SPLITS, Record, Source
from rvq_jax.io import check_local, write_atomic

_NAME_FEATURES = ('id', 'file_name', 'filename')
_LABEL_CHUNK = 256
_CACHE_LABELS_FROM = 100_000


class TfdsSource(Source):
  """One split of a prepared directory, such as .../cifar10/3.0.2."""

  def __init__(self, directory: str, split: str):
    self._directory, self._split = directory, split
    builder = tfds.builder_from_directory(directory)
    features = dict(builder.info.features.items())
    if not isinstance(features.get('image'), tfds.features.Image):
      raise ValueError(
        f'{directory}: expected a feature image, a tfds.features.Image, got '
        f'{", ".join(features)}'
      )
    label = features.get('label')  # text is not a class
    self._has_label = (label is not None and label.shape == ()) and (
      np.issubdtype(label.np_dtype, np.integer)
    )
    self._name = next((f for f in _NAME_FEATURES if f in features), None)
    try:
      self._data = builder.as_data_source(
        split, decoders={'image': tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise ValueError(
        f'{directory} is stored as {builder.info.file_format}: prepare it '
        'with --file_format=array_record'
      ) from error

  def __len__(self):
    return len(self._data)

  def __getitem__(self, index):
    try:
      example = self._data[int(index)]
    except RuntimeError as error:  # ArrayRecord's type for damage
      raise OSError(
        f'{self._split}/{index} of {self._directory} cannot be read: {error}'
      ) from error
    name = example[self._name] if self._name else f'{self._split}/{index}'
    if isinstance(name, bytes):
      name = name.decode('utf-8', 'backslashreplace')
    label = int(example['label']) if self._has_label else -1
    return Record(example['image'], label, str(name))

  @functools.cached_property
  def labels(self):
    """See `Source`; a cache beside a large split keeps its labels."""
    if len(self) < _CACHE_LABELS_FROM:
      return self._read_labels()
    cache = os.path.join(self._directory, f'.{self._split}-labels.npy')
    info = os.path.join(self._directory, 'dataset_info.json')
    with contextlib.suppress(OSError, ValueError, MemoryError):
      if os.path.getmtime(cache) >= os.path.getmtime(info):
        labels = np.load(cache, allow_pickle=False)
        if labels.shape == (len(self),) and labels.dtype == np.int32:
          return labels
    logging.info('reading the labels of %d records, once', len(self))
    labels, content = self._read_labels(), io.BytesIO()
    np.save(content, labels, allow_pickle=False)
    try:
      write_atomic(cache, content.getvalue())
    except OSError as error:
      logging.info('cannot save the labels for next time: %s', error)
    return labels

  def _read_labels(self) -> np.ndarray:
    """Reads the labels from the records."""
    labels, rows = [], range(len(self))
    for start in rows[::_LABEL_CHUNK] if self._has_label else ():
      try:
        chunk = self._data.__getitems__(rows[start : start + _LABEL_CHUNK])
      except RuntimeError as error:  # the split would change without these
        raise ValueError(
          f'the labels of {self._split} in {self._directory} cannot be read: '
          f'{error}; restore a copy of its files or prepare it again'
        ) from error
      labels += [int(example['label']) for example in chunk]
    first, last = min(labels, default=-1), max(labels, default=-1)
    if first < -(2**31) or last >= 2**31:
      raise ValueError(
        f'the labels of {self._split} in {self._directory} are from {first} to '
        f'{last}: expected integers from {-(2**31)} to {2**31 - 1}'
      )
    return np.array(labels or [-1] * len(self), np.int32)

  def identity(self):
    """See `Source`: name, version and split, which need no reading."""
    return [*os.path.normpath(self._directory).split(os.sep)[-2:], self._split]

  def __reduce__(self):
    return (type(self), (self._directory, self._split))


def open_tfds(name: str, *, data_dir: str | None = None) -> dict[str, Source]:
  """Opens the splits train, validation and test, if a tfds data set has them.

  First prepares CIFAR-10 and ImageNet if necessary. `name` is NAME, NAME/CONFIG
  or NAME:VERSION; `data_dir` None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
  """
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  data_dir = os.path.expanduser(data_dir or default)
  check_local(data_dir, 'data_dir')
  if data_dir.startswith('~'):
    raise ValueError(
      f'{data_dir}: this user has no home directory; set '
      '--config.data.data_dir or --data_dir'
    )
  directory = _find(name, data_dir) or prepare.prepare(name, data_dir)
  info = tfds.builder_from_directory(directory).info
  if info.file_format.value != 'array_record' and name in prepare.KNOWN:
    # TensorFlow's records stay; ours go beside them.
    directory = prepare.prepare(name, data_dir, folder='array_record')
    info = tfds.builder_from_directory(directory).info
  # Split -> its name in this data set.
  names = {{'val': 'validation'}.get(key, key): key for key in info.splits}
  names = {split: names[split] for split in SPLITS if split in names}
  if not names:
    raise ValueError(
      f'tfds:{name}: expected one of the splits {", ".join(SPLITS)}, got '
      f'{", ".join(info.splits) or "none"}'
    )
  for path in (p for key in names.values() for p in info.splits[key].filepaths):
    if not os.path.exists(path):
      raise ValueError(
        f'{path} is missing; remove {directory} and prepare it again'
      )
  return {split: TfdsSource(directory, key) for split, key in names.items()}


def _find(name: str, data_dir: str) -> str | None:
  """Returns the directory of a prepared data set, or None."""
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return None
  except Exception as error:  # from tfds, JSON, protobuf, the file system
    reason = str(error).partition('\n')[0].rstrip('.')
    raise ValueError(
      f'cannot open tfds:{name} in {data_dir}: {reason}; expected NAME, '
      'NAME/CONFIG or NAME:VERSION after tfds:, and an intact directory'
    ) from error
  return os.fspath(builder.data_path)
