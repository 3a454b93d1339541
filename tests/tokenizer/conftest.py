"""Images to be encoded, and folders to write to."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def photograph():
  """Returns a function that gives smooth noise as uint8 [h, w, 3]."""

  def make(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3))
    fine = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    return (fine * 0.8 + rng.integers(0, 50, fine.shape)).astype(np.uint8)

  return make


@pytest.fixture
def volume(tmp_path, monkeypatch):
  """An empty folder like a mounted volume, in a folder that is read-only."""
  folder = tmp_path / 'volume'
  folder.mkdir()

  def guard(name, count):
    function = getattr(os, name)

    def call(*arguments, **options):
      paths = [Path(os.path.abspath(path)) for path in arguments[:count]]
      beside = [path for path in paths if path.parent == tmp_path != path]
      for code, fails in (
        (errno.EXDEV, len({folder in path.parents for path in paths}) > 1),
        (errno.EBUSY, folder in paths and name != 'mkdir'),
        (errno.EROFS, beside and folder not in paths),
      ):
        if fails:
          raise OSError(code, os.strerror(code), *map(str, paths[:1]))
      return function(*arguments, **options)

    monkeypatch.setattr(os, name, call)

  guard('mkdir', 1)
  guard('rmdir', 1)
  guard('rename', 2)
  guard('replace', 2)
  return folder
