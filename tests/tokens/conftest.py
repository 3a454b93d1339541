"""A small tokenizer that was never trained: its tokens are as good as any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.training import config as config_lib


@pytest.fixture(scope='session')
def make_tokenizer(make_tiny_config):
  """Returns a function of a seed and model fields that gives a tokenizer."""

  @functools.cache
  def make(seed=0, **fields):
    config = make_tiny_config()
    config.model.update(fields)
    flat = config_lib.check_config(config)
    model = config_lib.build_model(flat)
    size = flat['data.image_size']
    images = jnp.zeros((1, size, size, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=True))(
      jax.random.key(seed)
    )
    return Tokenizer(model, dict(variables), config=flat, step=7)

  return make


@pytest.fixture
def photograph():
  """Returns a function that gives smooth noise as uint8 [h, w, 3]."""

  def make(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3))
    fine = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    return (fine * 0.8 + rng.integers(0, 50, fine.shape)).astype(np.uint8)

  return make
