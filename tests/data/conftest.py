"""Folders of numbered images, made in the test's own directory."""

import pytest
from tiny_data import encoded, numbered

from rvq_jax.data.folders import open_folder


@pytest.fixture
def make_source(tmp_path):
  """Returns a function that makes a source of n numbered 8 x 8 images."""

  def make(n, *, bad=(), **size):
    folder = tmp_path / f'set{n}'
    folder.mkdir()
    for i in range(n):
      data = encoded(numbered(i, **size))
      (folder / f'{i:05d}.png').write_bytes(data[:40] if i in bad else data)
    return open_folder(str(folder))['all']

  return make
