"""Each form of a convolution against its definition or Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rvq_jax.models.layers import Upsample, upsample


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape', [(2, 3, 5, 4), (1, 1, 1, 1), (1, 1, 4, 2)])
def test_upsample_adds_each_input_times_the_flipped_kernel(shape):
  x, kernel = draw(0, *shape), draw(1, 4, 4, shape[-1], 3)
  batch, height, width, _ = shape
  want = np.zeros((batch, 2 * height + 2, 2 * width + 2, 3))
  for i in range(height):
    for j in range(width):
      patch = np.einsum('bc,uvcf->buvf', x[:, i, j], kernel[::-1, ::-1])
      want[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
  got = jax.jit(upsample)(x, kernel)
  np.testing.assert_allclose(got, want[:, 1:-1, 1:-1], atol=1e-5)


def test_upsample_is_conv_transpose_with_its_parameters_and_gradients():
  x, g = draw(0, 2, 3, 4, 5), draw(1, 2, 6, 8, 6)
  ours, theirs = Upsample(6), nn.ConvTranspose(6, (4, 4), (2, 2))
  variables = ours.init(jax.random.key(0), x)
  variables['params']['bias'] = draw(2, 6)

  def compute(layer):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    values, vjp = jax.vjp(layer.apply, variables, x)
    return jax.tree.map(jnp.zeros_like, shapes), values, vjp(g)

  got, want = (jax.jit(lambda f=f: compute(f))() for f in (ours, theirs))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_kernel_gradient_is_summed_over_devices():
  x, kernel, g = draw(0, 8, 3, 3, 4), draw(1, 4, 4, 4, 3), draw(2, 8, 6, 6, 3)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rows, same = PartitionSpec('data'), PartitionSpec()

  def gradients(x, kernel, g):
    return jax.grad(lambda a: jnp.sum(upsample(*a) * g))((x, kernel))

  shared = jax.shard_map(
    gradients, mesh=mesh, in_specs=(rows, same, rows), out_specs=(rows, same)
  )
  got, want = (jax.jit(f)(x, kernel, g) for f in (shared, gradients))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
