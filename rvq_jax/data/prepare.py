"""Prepares CIFAR-10 and ImageNet as tfds directories, without TensorFlow.

tfds's builders and shuffle need TensorFlow. This writes records in the order of
that shuffle, so an index means the same image after either preparation. Shards
go one by one into a hidden folder, where an interrupted preparation resumes; a
complete folder gets its final name.
"""

import fcntl
import hashlib
import io
import logging
import os
import re
import tarfile
import urllib.request
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data.splits import hashed_order
from rvq_jax.io import explain_full_disk, write_atomic

CIFAR_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR_SHA = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
_MAX_CIFAR_BYTES = 2**28
KNOWN = {'cifar10': '3.0.2', 'imagenet2012': '5.1.0'}
"""Sets that need no TensorFlow, and their versions."""
IMAGENET_ARCHIVES = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
_CIFAR_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'


def prepare(name: str, data_dir: str, folder: str = '') -> str:
  """Prepares one of `KNOWN` in `folder` of `data_dir`; returns its directory.

  The user's downloaded archives belong in `data_dir`/downloads/manual.
  """
  if name not in KNOWN:
    raise ValueError(
      f'tfds:{name} is not prepared in {data_dir}, and rvq_jax prepares only '
      'cifar10 and imagenet2012; prepare it with TensorFlow: tfds build '
      f'{name.partition(":")[0]} --file_format=array_record '
      f'--data_dir={data_dir}'
    )
  open_set = {'cifar10': _cifar10, 'imagenet2012': _imagenet}[name]
  manual = os.path.join(data_dir, 'downloads', 'manual')
  folder = os.path.join(data_dir, folder)
  return write_tfds(name, KNOWN[name], folder, lambda: open_set(manual))


def write_tfds(
  name: str, version: str, data_dir: str, open_set, *, shard_size: int = 5005
) -> str:
  """Writes a tfds directory of ArrayRecord files, unless it exists.

  One of several processes works, the others wait. `open_set()` returns the tfds
  features and, by split, stable keys for the order and a reader of example i.
  """
  final = os.path.join(data_dir, name, version)
  work = os.path.join(data_dir, f'.{name}-{version}-incomplete')
  with explain_full_disk(data_dir, 'start the same command again: it resumes'):
    try:
      os.makedirs(os.path.dirname(final), exist_ok=True)
      lock = open(os.path.join(data_dir, f'.{name}.lock'), 'w')
    except OSError as error:
      raise ValueError(
        f'cannot write to {data_dir}: {error.strerror}; set '
        '--config.data.data_dir to another folder'
      ) from error
    with lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
      if not os.path.exists(os.path.join(final, 'dataset_info.json')):
        logging.info('preparing %s in %s', name, final)
        _write(name, version, work, *open_set(), shard_size)
        os.rename(work, final)
  return final


class _Info(tfds.core.DatasetInfo):
  """A description with atomic writes."""

  def write_to_directory(self, folder, all_metadata=True):
    new = f'{folder}-info'
    os.makedirs(new, exist_ok=True)
    super().write_to_directory(new, all_metadata)
    for file in os.listdir(new):
      os.replace(os.path.join(new, file), os.path.join(folder, file))
    os.rmdir(new)


def _write(name, version, work, features, splits, shard_size: int) -> None:
  """Writes the missing shards to `work`, and their description."""
  os.makedirs(work, exist_ok=True)
  info = _Info(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name, tfds.core.Version(version), data_dir=work, module_name=''
    ),
    features=tfds.features.FeaturesDict(features),
    supervised_keys=('image', 'label') if 'label' in features else None,
  )
  writer = tfds.core.SequentialWriter(
    info, shard_size, overwrite=False, file_format='array_record'
  )
  writer.initialize_splits(list(splits), fail_if_exists=False)
  for split, (keys, read) in splits.items():
    order, done = hashed_order(split, keys), info.splits[split].num_examples
    for start in range(done, len(order), shard_size):
      # Writes one shard, then notes it in the description.
      writer.add_examples({split: map(read, order[start : start + shard_size])})
    writer.close_splits([split])


def _cifar10(manual: str):
  """Opens CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html."""
  path = os.path.join(manual, os.path.basename(CIFAR_URL))
  if not os.path.exists(path):
    _download(path)
  with open(path, 'rb') as stream:
    if hashlib.file_digest(stream, 'sha256').hexdigest() != CIFAR_SHA:
      raise ValueError(
        f'{path} is not the archive with sha256 {CIFAR_SHA}; remove it and '
        'start the same command again'
      )
  features = {
    'id': tfds.features.Text(),
    'image': tfds.features.Image(shape=(32, 32, 3)),
    'label': tfds.features.ClassLabel(names=_CIFAR_CLASSES.split()),
  }
  train = [f'data_batch_{i}' for i in range(1, 6)]
  files = {'train': train, 'test': ['test_batch']}
  return features, {s: _cifar10_split(path, s, files[s]) for s in files}


def _download(path: str) -> None:
  """Downloads the archive; only a complete file gets its name."""
  logging.info('downloading %s', CIFAR_URL)
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with urllib.request.urlopen(CIFAR_URL, timeout=30) as remote:
      data = remote.read(_MAX_CIFAR_BYTES)
    if hashlib.sha256(data).hexdigest() != CIFAR_SHA:
      raise OSError('it ended early, or the file has changed')
    write_atomic(path, data)
  except OSError as error:
    raise ValueError(
      f'cannot download {CIFAR_URL} ({error}); put it at {path}'
    ) from error


def _cifar10_split(path: str, split: str, files: list[str]):
  """Reads a split; a record holds the label, then pixels by channel."""
  with tarfile.open(path, 'r:gz') as archive:
    members = [f'cifar-10-batches-bin/{file}.bin' for file in files]
    data = b''.join(archive.extractfile(name).read() for name in members)
  records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)

  def read(i: int):
    pixels = records[i, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    png = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(png, 'PNG')
    label = int(records[i, 0])
    return {'id': f'{split}_{i:05d}', 'image': png.getvalue(), 'label': label}

  return range(len(records)), read


def _imagenet(manual: str):
  """Opens ImageNet (ILSVRC 2012) in its two packed archives."""
  paths = [os.path.join(manual, name) for name in IMAGENET_ARCHIVES]
  missing = [path for path in paths if not os.path.exists(path)]
  if missing:
    raise ValueError(
      f'imagenet2012 needs {" and ".join(missing)}; register at https://'
      'image-net.org/download-images, download ILSVRC 2012 and put them there'
    )
  folder = tfds.core.tfds_path('datasets/imagenet2012')
  classes = (folder / 'labels.txt').read_text().split()
  train = {f'{wnid}.tar': i for i, wnid in enumerate(classes)}
  validation = (folder / 'validation_labels.txt').read_text().split()
  validation = {
    f'ILSVRC2012_val_{i:08d}.JPEG': train[f'{wnid}.tar']
    for i, wnid in enumerate(validation, 1)
  }
  features = {
    'image': tfds.features.Image(encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(names=classes),
    'file_name': tfds.features.Text(),
  }
  return features, {
    'train': _tar_examples(paths[0], train),
    'validation': _tar_examples(paths[1], validation),
  }


def _tar_examples(path: str, labels: dict[str, int]):
  """Opens an archive with the members `labels`: images, or a tar per class."""
  try:
    entries = list(_index(path, labels))
  except (tarfile.TarError, OSError) as error:
    raise ValueError(
      f'{path} is not a complete tar archive ({error}); download it again'
    ) from error

  def read(i: int):
    name, offset, size, label = entries[i]
    with open(path, 'rb') as stream:
      stream.seek(offset)
      return {'image': stream.read(size), 'label': label, 'file_name': name}

  return [name for name, *_ in entries], read


def _index(path: str, labels: dict[str, int]):
  """Yields the (name, offset, size, label) of each image in an archive."""
  with tarfile.open(path, 'r:') as outer:
    for member in _files(outer, path, labels.__contains__):
      start, label = member.offset_data, labels[member.name]
      wnid, is_class, _ = member.name.partition('.tar')
      if not is_class:
        yield member.name, start, member.size, label
        continue
      with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as inner:
        fits = re.compile(rf'{wnid}_\d+\.JPEG').fullmatch
        for image in _files(inner, path, fits):
          yield image.name, start + image.offset_data, image.size, label


def _files(archive, path: str, fits) -> Iterator[tarfile.TarInfo]:
  """Yields an archive's members; refuses other names, links, no members."""
  member = None
  for member in archive:
    if not (fits(member.name) and member.isreg()):
      raise ValueError(
        f'{path} holds {member.name!r}, which the official archive lacks; '
        'download it again'
      )
    yield member
  if member is None:
    raise ValueError(f'{path} holds no images; download it again')
