"""CIFAR-10 from the official binary archive, as tfds lays it out.

https://www.cs.toronto.edu/~kriz/cifar.html. A record of the archive is one
byte of label and 3072 bytes of pixels, channel by channel.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
import shutil
import tarfile
import urllib.request

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data.builders import Examples, Recipe

URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
NAMES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)
_FILES = {
  'train': [f'data_batch_{i}.bin' for i in range(1, 6)],
  'test': ['test_batch.bin'],
}
_RECORD = 1 + 3 * 32 * 32
_TIMEOUT_S = 30


def make_recipe(*, url: str = URL, sha256: str = SHA256) -> Recipe:
  """Makes the recipe of CIFAR-10.

  Args:
    url: of the archive, where it has not been put by hand.
    sha256: that the archive must have, in hexadecimal.

  Returns:
    The recipe of tfds's cifar10/3.0.2, with PNG images.
  """
  return Recipe(
    name='cifar10',
    version='3.0.2',
    description='CIFAR-10: 60,000 colour images of 32 x 32 in 10 classes.',
    homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    num_shards=1,
    features=_features,
    splits=functools.partial(_splits, url=url, sha256=sha256),
  )


def _features() -> tfds.features.FeaturesDict:
  """Returns the features of tfds's cifar10."""
  return tfds.features.FeaturesDict(
    {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(shape=(32, 32, 3)),
      'label': tfds.features.ClassLabel(names=list(NAMES)),
    }
  )


def _splits(manual_dir: str, *, url: str, sha256: str) -> dict[str, Examples]:
  """Reads the archive, 180 MB, and opens its two splits."""
  path = os.path.join(manual_dir, os.path.basename(url))
  if not os.path.exists(path):
    _download(url, path)
  _check(path, url, sha256)
  return {split: _open(path, split) for split in _FILES}


def _download(url: str, path: str) -> None:
  """Downloads the archive; an interrupted download leaves nothing."""
  logging.info('downloading %s', url)
  partial = f'{path}.{os.getpid()}.partial'
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with (
      urllib.request.urlopen(url, timeout=_TIMEOUT_S) as remote,
      open(partial, 'wb') as local,
    ):
      shutil.copyfileobj(remote, local)
    os.replace(partial, path)
  except OSError as error:
    raise ValueError(
      f'cannot download {url} ({error}); download it elsewhere and put it at '
      f'{path}'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      os.remove(partial)


def _check(path: str, url: str, sha256: str) -> None:
  """Compares the checksum of the archive."""
  with open(path, 'rb') as stream:
    found = hashlib.file_digest(stream, 'sha256').hexdigest()
  if found != sha256:
    raise ValueError(
      f'{path} has sha256 {found}, expected {sha256}; remove it and download '
      f'{url} again'
    )


def _open(path: str, split: str) -> Examples:
  """Reads one split into memory."""
  parts = []
  with tarfile.open(path, 'r:gz') as archive:
    for file in _FILES[split]:
      member = f'cifar-10-batches-bin/{file}'
      try:
        data = archive.extractfile(member).read()
      except (KeyError, AttributeError) as error:
        raise ValueError(f'{path} has no file {member}') from error
      if len(data) % _RECORD:
        raise ValueError(
          f'{member} in {path} has {len(data)} bytes; expected a multiple of '
          f'{_RECORD}'
        )
      parts.append(np.frombuffer(data, np.uint8).reshape(-1, _RECORD))
  records = np.concatenate(parts)

  def read(i: int) -> dict[str, object]:
    """Returns example i in official order."""
    pixels = records[i, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, 'PNG')
    return {
      'id': f'{split}_{i:05d}',
      'image': buffer.getvalue(),
      'label': int(records[i, 0]),
    }

  return Examples(range(len(records)), read)


RECIPE = make_recipe()
