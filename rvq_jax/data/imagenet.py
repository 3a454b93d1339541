"""ImageNet (ILSVRC 2012) from its two archives, as tfds lays it out.

The archives are read where they are: a first pass over the tar headers finds
where each JPEG lies, a second copies its bytes as they are. Nothing is
unpacked to disk, and no more than one image is in memory.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from rvq_jax.data.builders import Examples, Recipe

TRAIN = 'ILSVRC2012_img_train.tar'
VALIDATION = 'ILSVRC2012_img_val.tar'
_PAGE = 'https://image-net.org/download-images'
_VALIDATION_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.JPEG')


def _tfds_lines(file: str) -> list[str]:
  """Reads a list that ships with tfds."""
  path = tfds.core.tfds_path(f'datasets/imagenet2012/{file}')
  try:
    return path.read_text().split()
  except OSError as error:
    raise ValueError(
      f'the installed tensorflow-datasets has no {path}; expected version '
      '4.9.9 or 4.9.10, install one of these'
    ) from error


def _features() -> tfds.features.FeaturesDict:
  """Returns the features of tfds's imagenet2012."""
  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(names=_tfds_lines('labels.txt')),
      'file_name': tfds.features.Text(),
    }
  )


def _splits(manual_dir: str) -> dict[str, Examples]:
  """Indexes the two archives."""
  paths = [os.path.join(manual_dir, name) for name in (TRAIN, VALIDATION)]
  missing = [path for path in paths if not os.path.exists(path)]
  if missing:
    raise ValueError(
      f'imagenet2012 needs {" and ".join(missing)}; register at {_PAGE}, '
      'download the files of ILSVRC 2012 and put them there'
    )
  wnids = _tfds_lines('labels.txt')
  rank = {wnid: i for i, wnid in enumerate(wnids)}
  order = _tfds_lines('validation_labels.txt')
  return {
    'train': _open(paths[0], lambda path: _index_train(path, rank)),
    'validation': _open(paths[1], lambda path: _index_val(path, rank, order)),
  }


Entry = tuple[str, int, int, int]
"""File name, offset in the archive, size in bytes, label."""


def _open(path: str, index: Callable[[str], Iterator[Entry]]) -> Examples:
  """Makes examples of the entries of an archive."""
  try:
    entries = list(index(path))
  except (tarfile.TarError, OSError) as error:
    raise ValueError(
      f'{path} is not a complete tar archive ({error}); download it again'
    ) from error
  if not entries:
    raise ValueError(f'{path} holds no images; download it again')
  names = [entry[0] for entry in entries]
  where = np.array([entry[1:] for entry in entries], np.int64)
  del entries

  def read(i: int) -> dict[str, object]:
    """Copies one JPEG out of the archive."""
    offset, size, label = where[i].tolist()
    with open(path, 'rb') as stream:
      stream.seek(offset)
      image = stream.read(size)
    return {'image': image, 'label': label, 'file_name': names[i]}

  return Examples(names, read)


def _index_train(path: str, rank: dict[str, int]) -> Iterator[Entry]:
  """Indexes the training archive, a tar of one tar per class."""
  with tarfile.open(path, 'r:') as outer:
    for member in _files(outer, path):
      wnid = os.path.splitext(os.path.basename(member.name))[0]
      if wnid not in rank:
        raise ValueError(
          f'{path} holds {member.name}; expected tar files named after the '
          '1000 classes of ILSVRC 2012, such as n01440764.tar'
        )
      with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as images:
        for image in _files(images, f'{path}:{member.name}'):
          offset = member.offset_data + image.offset_data
          yield _base(image), offset, image.size, rank[wnid]


def _index_val(
  path: str, rank: dict[str, int], order: list[str]
) -> Iterator[Entry]:
  """Indexes the validation archive; the number in a name gives its label."""
  with tarfile.open(path, 'r:') as archive:
    for image in _files(archive, path):
      match = _VALIDATION_NAME.fullmatch(_base(image))
      number = int(match[1]) if match else 0
      if not 1 <= number <= len(order):
        raise ValueError(
          f'{path} holds {image.name}; expected '
          f'ILSVRC2012_val_00000001.JPEG to {len(order):08d}'
        )
      yield _base(image), image.offset_data, image.size, rank[order[number - 1]]


def _base(member: tarfile.TarInfo) -> str:
  """Returns the file name without folders."""
  return os.path.basename(member.name)


def _files(archive: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
  """Yields the files of an archive; refuses names that point out of it."""
  for member in archive:
    if member.name.startswith('/') or '..' in member.name.split('/'):
      raise ValueError(
        f'{path} holds the unsafe name {member.name!r}; it is not the official '
        'archive, download it again'
      )
    if member.isdir():
      continue
    if not member.isreg():
      raise ValueError(
        f'{path} holds {member.name!r}, which is not a file; it is not the '
        'official archive, download it again'
      )
    yield member


RECIPE = Recipe(
  name='imagenet2012',
  version='5.1.0',
  description='ILSVRC 2012: 1,281,167 training and 50,000 validation images.',
  homepage='https://image-net.org/',
  num_shards=256,
  features=_features,
  splits=_splits,
)
