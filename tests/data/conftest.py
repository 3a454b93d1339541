"""Folders of numbered images, made in the test's own directory."""

import numpy as np
import pytest
from PIL import Image

from rvq_jax.data.folders import open_folder


def numbered(i, height=8, width=8):
  """An image of one colour that says which one it is."""
  colour = (i % 256, i // 256, 77)
  return np.full((height, width, 3), colour, np.uint8)


@pytest.fixture
def make_source(tmp_path):
  """Returns a function that makes a source of n numbered 8 x 8 images."""

  def make(n, *, bad=(), height=8, width=8):
    folder = tmp_path / f'set{n}'
    folder.mkdir()
    for i in range(n):
      path = folder / f'{i:05d}.png'
      Image.fromarray(numbered(i, height, width)).save(path)
      if i in bad:
        path.write_bytes(path.read_bytes()[:40])
    return open_folder(str(folder))['all']

  return make


@pytest.fixture
def ids():
  """Returns a function that reads the numbers back from a batch."""

  def read(batch):
    corner = batch['image'][:, 0, 0].astype(int)
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()

  return read
