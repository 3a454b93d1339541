"""A small tokenizer, and a page with two images."""

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

  def make(**fields):
    for name, value in fields.items():
      tiny_config.model[name] = value
    flat = config_lib.check_config(tiny_config)
    model = config_lib.build_model(flat)
    variables = jax.jit(
      lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)), train=True)
    )(jax.random.key(0))
    return Tokenizer(model, dict(variables), config=flat, step=7)

  return make


@pytest.fixture
def images():
  """Two images of other sizes, the first of which holds two colors."""
  rng = np.random.default_rng(0)
  one = np.zeros((16, 24, 3), np.uint8)
  one[:, 12:] = (200, 120, 40)
  other = rng.integers(0, 256, (20, 12, 3), np.uint8)
  return [('one.png', one), ('</script><b>other', other)]


@pytest.fixture
def make_data(make_tokenizer, images):
  """Returns a function of model fields: the tokenizer and the page's data."""

  def make(**fields):
    tokenizer = make_tokenizer(**fields)
    return tokenizer, page.page_data(tokenizer, 'tiny', images)

  return make
