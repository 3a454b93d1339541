"""Prepared TensorFlow Datasets directories, read without TensorFlow.

`tfds.data_source` reads ArrayRecord files with random access; images stay
encoded (`SkipDecoding`) until a loader decodes them with Pillow.
"""

import logging
import os
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from rvq_jax.data.sources import Record, Source

DEFAULT_DATA_DIR = '~/tensorflow_datasets'
_NAME_FEATURES = ('id', 'file_name', 'filename')
_LABEL_CHUNK = 256
_KEEP_LABELS_FROM = 100_000


class TfdsSource(Source):
  """One split of a prepared directory.

  Args:
    directory: with dataset_info.json, such as .../cifar10/3.0.2.
    split: its name in that directory.

  Raises:
    ValueError: if the data cannot be read at random or have no images.
  """

  def __init__(self, directory: str, split: str):
    self._directory = directory
    self._split = split
    self._labels = None
    builder = tfds.builder_from_directory(directory)
    features = dict(builder.info.features.items())
    if not isinstance(features.get('image'), tfds.features.Image):
      raise ValueError(
        f'{directory} has the features {", ".join(features)}; expected one '
        'called image that is a tfds.features.Image'
      )
    self._has_label = 'label' in features and features['label'].shape == ()
    self._name = next((f for f in _NAME_FEATURES if f in features), None)
    try:
      self._data = builder.as_data_source(
        split, decoders={'image': tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise ValueError(
        f'{directory} is stored as {builder.info.file_format}; expected '
        'array_record: prepare it with --file_format=array_record'
      ) from error

  def __len__(self):
    return len(self._data)

  def __getitem__(self, index):
    try:
      example = self._data[int(index)]
    except RuntimeError as error:  # how ArrayRecord says that it is damaged
      raise OSError(
        f'{self._split}/{index} of {self._directory} cannot be read: {error}'
      ) from error
    if self._name is None:
      name = f'{self._split}/{index}'
    else:
      name = example[self._name].decode('utf-8', 'backslashreplace')
    return Record(example['image'], self._label(example), name)

  def _label(self, example) -> int:
    """Returns the label of a tfds example."""
    return int(example['label']) if self._has_label else -1

  @property
  def labels(self):
    """The labels, int32 [n].

    tfds keeps label and image in one record, so this reads the whole split.
    For a large one the labels are kept in a file beside it.
    """
    if self._labels is None:
      self._labels = self._kept_labels()
    if self._labels is None:
      self._labels = self._read_labels()
      if len(self) >= _KEEP_LABELS_FROM:
        self._keep_labels()
    return self._labels

  def _read_labels(self) -> np.ndarray:
    """Reads the labels from the records."""
    labels = np.full(len(self), -1, np.int32)
    if not self._has_label:
      return labels
    if len(self) >= _KEEP_LABELS_FROM:
      logging.info('reading the labels of %d records, once', len(self))
    for start in range(0, len(self), _LABEL_CHUNK):
      rows = range(start, min(start + _LABEL_CHUNK, len(self)))
      try:
        examples = self._data.__getitems__(rows)
      except RuntimeError as error:  # another split without this one would do
        raise ValueError(
          f'the labels of {self._split}/{rows.start} to {rows.stop - 1} of '
          f'{self._directory} cannot be read: {error}; put back a copy of its '
          'files, or remove it and prepare it again'
        ) from error
      labels[rows.start : rows.stop] = [self._label(e) for e in examples]
    return labels

  def _labels_file(self) -> str:
    """Returns the path of the kept labels."""
    return os.path.join(self._directory, f'.{self._split}-labels.npy')

  def _kept_labels(self) -> np.ndarray | None:
    """Returns the kept labels unless they are missing or out of date."""
    info = os.path.join(self._directory, 'dataset_info.json')
    try:
      if os.path.getmtime(self._labels_file()) < os.path.getmtime(info):
        return None
      labels = np.load(self._labels_file(), allow_pickle=False)
    except (OSError, ValueError, MemoryError):  # the header may claim anything
      return None
    sound = labels.shape == (len(self),) and labels.dtype == np.int32
    return labels if sound else None

  def _keep_labels(self) -> None:
    """Writes the labels beside the data, where one may write there."""
    try:
      with tempfile.NamedTemporaryFile(
        dir=self._directory, delete=False
      ) as stream:
        np.save(stream, self._labels, allow_pickle=False)
      os.chmod(stream.name, 0o644)
      os.replace(stream.name, self._labels_file())
    except OSError as error:
      logging.info('cannot keep the labels for next time: %s', error)

  def identity(self):
    """Name, version and split: the names of images are not known unread."""
    return [*os.path.normpath(self._directory).split(os.sep)[-2:], self._split]

  def __reduce__(self):
    return (type(self), (self._directory, self._split))

  def __repr__(self):
    return f'TfdsSource({self._directory!r}, {self._split!r}, n={len(self)})'


def open_tfds(name: str, *, data_dir: str | None = None) -> dict[str, Source]:
  """Opens a tfds data set; prepares it first where we know how.

  Args:
    name: as tfds writes it: NAME, NAME/CONFIG or NAME:VERSION.
    data_dir: folder of prepared data sets; None for tfds's default, which is
      $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    Source by split name, of the splits train, validation and test.

  Raises:
    ValueError: if the data set is not there and cannot be prepared.
  """
  default = os.environ.get('TFDS_DATA_DIR', DEFAULT_DATA_DIR)
  data_dir = os.path.expanduser(data_dir or default)
  directory = _find(name, data_dir)
  if directory is None:
    from rvq_jax.data import builders

    base, _, version = name.partition(':')
    directory = builders.prepare(base, data_dir, version=version)
  info = tfds.builder_from_directory(directory).info
  splits = [s for s in ('train', 'validation', 'test') if s in info.splits]
  for split in splits:
    for path in info.splits[split].filepaths:
      if not os.path.exists(path):
        raise ValueError(
          f'{path} is missing; remove {directory} and prepare it again'
        )
  return {split: TfdsSource(directory, split) for split in splits}


def _find(name: str, data_dir: str) -> str | None:
  """Returns the directory of a prepared data set, None if there is none."""
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return None
  # A bad name and a damaged directory surface as errors of tfds, of JSON, of
  # protobuf and of the file system.
  except Exception as error:
    reason = str(error).partition('\n')[0].rstrip('.')
    raise ValueError(
      f'cannot open tfds:{name} in {data_dir}: {reason}; expected NAME, '
      'NAME/CONFIG or NAME:VERSION after tfds:, and an intact directory'
    ) from error
  return os.fspath(builder.data_path)
