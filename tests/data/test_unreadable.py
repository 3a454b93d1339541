"""Folders that one may not read, by the system's own permissions."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from rvq_jax.data.datasets import open_dataset

NOBODY = 65534


@contextlib.contextmanager
def without_privileges():
  """As root, becomes nobody for a while: root may read everything."""
  was = os.geteuid()
  if was == 0:
    os.seteuid(NOBODY)
  try:
    yield
  finally:
    os.seteuid(was)


@pytest.fixture
def images():
  # Not tmp_path, whose parents nobody may enter.
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    for name in ('train/a/x.png', 'train/b/y.png', 'test/a/z.png'):
      path = Path(folder) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (4, 4)).save(path)
    yield Path(folder)
    for path in [*Path(folder).rglob('*')]:
      path.chmod(0o755)


@pytest.mark.parametrize('closed', ['train', 'train/b', 'test/a'])
def test_a_folder_without_permission_is_one_line(closed, images):
  (images / closed).chmod(0)
  with (
    without_privileges(),
    pytest.raises(ValueError, match=f'{closed}: Permission denied') as caught,
  ):
    open_dataset(f'folder:{images}')
  assert '\n' not in str(caught.value)


def test_a_file_without_permission_is_an_oserror_that_loaders_skip(images):
  (images / 'train/a/x.png').chmod(0)
  source = open_dataset(f'folder:{images}').train
  with without_privileges(), pytest.raises(PermissionError):
    source[0]
