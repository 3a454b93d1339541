"""A page with two images."""

import functools

import numpy as np
import pytest

from rvq_jax.explorer import page


@pytest.fixture(scope='session')
def images():
  """Two images of other sizes, the first of which holds two colors."""
  one = np.zeros((16, 24, 3), np.uint8)
  one[:, 12:] = (200, 120, 40)
  other = np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8)
  return [('one.png', one), ('</script><b>other', other)]


@pytest.fixture(scope='session')
def make_data(make_tokenizer, images):
  """Returns a function of a quantizer: the tokenizer and the page's data."""

  @functools.cache
  def make(quantizer='vq'):
    tokenizer = make_tokenizer(quantizer=quantizer, depth=2)
    shown = images
    if not tokenizer.any_size:
      shown = [(name, np.resize(x, (16, 16, 3))) for name, x in images]
    return tokenizer, page.page_data(tokenizer, 'tiny', shown)

  return make
