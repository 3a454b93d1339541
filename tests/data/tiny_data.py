"""What the tests of this folder share: small images, a set of TensorFlow's."""

import io

import numpy as np
from PIL import Image


def encoded(image, fmt='PNG', **options):
  """The bytes of a file of an image, from Pillow or as pixels."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, fmt, **options)
  return buffer.getvalue()


def numbered(i, height=8, width=8):
  """Pixels of one colour that says which image it is."""
  colour = (i % 256, i // 256, 77)
  return np.full((height, width, 3), colour, np.uint8)


def ids(images):
  """The numbers of `numbered` images."""
  corner = images[:, 0, 0].astype(int)
  return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def noise(height=6, width=9):
  """Random pixels."""
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tfrecord(folder):
  """Gives a prepared set the look of TensorFlow's own records."""
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  for file in folder.glob('*array_record*'):
    file.rename(str(file).replace('array_record', 'tfrecord'))
