"""The discriminator: its map of logits, its blur, no batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import init

from rvq_jax.models.discriminator import Discriminator, blur

IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype('f')


@functools.cache
def build():
  module = Discriminator(widths=(8, 16, 16, 16))
  return jax.jit(module.apply), init(module, IMAGES)


@pytest.mark.parametrize(
  ('side', 'stages', 'grid'),
  [(8, 1, 4), (32, 3, 4), (64, 4, 4), (72, 4, 5), (256, 4, 16)],
)
def test_stages_leave_a_map_of_logits(side, stages, grid):
  run = Discriminator(dtype=jnp.bfloat16).init_with_output
  image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  logits, variables = jax.eval_shape(run, jax.random.key(0), image)
  assert logits.shape == (2, grid, grid) and logits.dtype == jnp.float32
  assert set(variables) == {'params'}  # no statistics
  params = variables['params']
  kernels = [p['kernel'].shape[:2] for p in params.values() if 'kernel' in p]
  assert sorted(kernels) == [(3, 3), *stages * [(4, 4)]]
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_the_logits_of_an_image_do_not_depend_on_the_others():
  apply, variables = build()
  changed = np.concatenate([IMAGES[:1], -IMAGES[1:]])
  one, other = (apply(variables, x) for x in (IMAGES, changed))
  np.testing.assert_array_equal(one[0], other[0])
  assert np.abs(one[1] - other[1]).max() > 1e-3


def test_detail_of_single_pixels_reaches_the_logits():
  apply, variables = build()
  board = np.indices((32, 32)).sum(0) % 2 * 2.0 - 1
  noisy = 0.5 * IMAGES + 0.5 * board.astype('f')[None, :, :, None]
  apart = np.abs(apply(variables, noisy) - apply(variables, 0.5 * IMAGES))
  assert apart.max() > 0.05


def test_the_blur_equals_a_loop():
  x = np.random.default_rng(1).normal(size=(2, 5, 4, 3)).astype('f')
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), 'edge')
  want = np.zeros(x.shape)
  weights = 0.25, 0.5, 0.25
  for i, j in np.ndindex(3, 3):
    want += weights[i] * weights[j] * padded[:, i : i + 5, j : j + 4]
  np.testing.assert_allclose(blur(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)
