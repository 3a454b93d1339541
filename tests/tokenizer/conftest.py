"""Images to be encoded."""

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
