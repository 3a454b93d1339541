"""A small tokenizer, and a page with two images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.explorer import page
from rvq_jax.training import config as config_lib


@pytest.fixture
def make_tokenizer(tiny_config):
  """Returns a function of model fields that gives an untrained tokenizer."""
  return functools.partial(_make_tokenizer, tiny_config)


def _make_tokenizer(config, **fields):
  config.model.update(fields)
  flat = config_lib.check_config(config)
  model = config_lib.build_model(flat)
  variables = jax.jit(
    lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)), train=True)
  )(jax.random.key(0))
  return Tokenizer(model, dict(variables), config=flat, step=7)


@pytest.fixture(scope='session')
def images():
  """Two images of other sizes, the first of which holds two colors."""
  rng = np.random.default_rng(0)
  one = np.zeros((16, 24, 3), np.uint8)
  one[:, 12:] = (200, 120, 40)
  other = rng.integers(0, 256, (20, 12, 3), np.uint8)
  return [('one.png', one), ('</script><b>other', other)]


@pytest.fixture(scope='session')
def make_data(make_tiny_config, images):
  """Returns a function of model fields: the tokenizer and the page's data."""

  @functools.cache
  def make(**fields):
    tokenizer = _make_tokenizer(make_tiny_config(), **fields)
    shown = images
    if tokenizer.sides:  # takes the size of its training alone
      shown = [(name, np.resize(x, (16, 16, 3))) for name, x in images]
    return tokenizer, page.page_data(tokenizer, 'tiny', shown)

  return make
