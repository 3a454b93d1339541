"""Each form of a convolution against its definition or Flax's own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rvq_jax.models.convolutions import (
  _by_matmuls,
  _upsample_by_convolution,
  _upsample_by_matmul,
  convolve,
)

NHWC = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('padding', ['SAME', 'VALID', ((2, 1), (0, 3))])
@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (2, 3)])
def test_the_gradients_by_matmuls_are_those_of_the_convolution(
  strides, padding
):
  x, kernel = draw(0, 2, 9, 8, 5), draw(1, 3, 3, 5, 4)

  def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **NHWC)

  g = jax.eval_shape(plain, x, kernel)
  g = draw(2, *g.shape)

  def gradients(f):
    return jax.jit(lambda a: jax.vjp(lambda a: f(*a), a)[1](g))((x, kernel))

  got = gradients(_by_matmuls(plain, strides, padding))
  for a, b in zip(*map(jax.tree.leaves, (got, gradients(plain))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('shape', 'tolerance', 'dtype'),
  [
    ((1, 32, 32, 32), 1e-4, jnp.float32),
    ((128, 8, 8, 32), 1e-4, jnp.float32),
    ((1, 32, 32, 32), 3e-2, jnp.bfloat16),
    ((2, 4, 4, 32), 1e-4, jnp.float32),
  ],
)
def test_large_and_small_maps_have_the_gradients_of_flax(
  shape, tolerance, dtype
):
  x = jnp.asarray(draw(0, *shape), dtype)
  layer = functools.partial(nn.Conv, 32, (3, 3), use_bias=False, dtype=dtype)
  variables = jax.jit(layer().init)(jax.random.key(0), x)
  g = draw(1, *shape)

  def gradients(module):
    def loss(variables, x):
      return jnp.mean(module.apply(variables, x).astype(jnp.float32) * g)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, x)

  got = gradients(layer(conv_general_dilated=convolve))
  want = gradients(layer())
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()
    )


def test_the_kernel_of_a_large_map_is_one_convolution_less_on_cpu_alone():
  x, kernel = jnp.zeros((1, 32, 32, 32)), jnp.zeros((3, 3, 32, 32))

  def loss(x, kernel):
    return jnp.sum(convolve(x, kernel, (1, 1), 'SAME', **NHWC) ** 2)

  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
  cpu, cuda = (
    traced.lower(lowering_platforms=(name,)).as_text()
    for name in ('cpu', 'cuda')
  )
  count = 'stablehlo.convolution'
  assert cpu.count(count) == cuda.count(count) - 1


@pytest.mark.parametrize(
  'upsample', [_upsample_by_matmul, _upsample_by_convolution]
)
@pytest.mark.parametrize('shape', [(2, 3, 5, 4), (1, 1, 1, 1), (1, 1, 4, 2)])
def test_upsample_adds_each_input_times_the_flipped_kernel(upsample, shape):
  x, kernel = draw(0, *shape), draw(1, 4, 4, shape[-1], 3)
  batch, height, width, _ = shape
  want = np.zeros((batch, 2 * height + 2, 2 * width + 2, 3))
  for i in range(height):
    for j in range(width):
      patch = np.einsum('bc,uvcf->buvf', x[:, i, j], kernel[::-1, ::-1])
      want[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
  got = jax.jit(upsample)(x, kernel)
  np.testing.assert_allclose(got, want[:, 1:-1, 1:-1], atol=1e-5)


def test_upsample_has_the_gradients_of_the_convolution():
  x, kernel, g = draw(0, 2, 3, 3, 4), draw(1, 4, 4, 4, 2), draw(2, 2, 6, 6, 2)

  def gradients(f):
    return jax.jit(jax.grad(lambda a: jnp.sum(f(*a) * g)))((x, kernel))

  got = gradients(_upsample_by_matmul)
  for a, b in zip(got, gradients(_upsample_by_convolution), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_upsample_by_convolution_has_the_gradients_of_conv_transpose():
  x, kernel, g = draw(0, 2, 3, 4, 5), draw(1, 4, 4, 5, 6), draw(2, 2, 6, 8, 6)
  layer = nn.ConvTranspose(6, (4, 4), (2, 2), use_bias=False)

  def theirs(x, kernel):
    return layer.apply({'params': {'kernel': kernel}}, x)

  def gradients(f):
    return jax.jit(lambda a: jax.vjp(lambda a: f(*a), a)[1](g))((x, kernel))

  got, want = gradients(_upsample_by_convolution), gradients(theirs)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('ours', 'plain'),
  [
    (_upsample_by_convolution, _upsample_by_matmul),
    (
      lambda x, kernel: convolve(x, kernel, (1, 1), 'SAME', **NHWC),
      lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', **NHWC
      ),
    ),
  ],
  ids=['upsample', 'convolve'],
)
def test_the_kernel_gradient_is_summed_over_devices(ours, plain):
  x, kernel = draw(0, 8, 32, 32, 32), draw(1, 4, 4, 32, 3)
  g = draw(2, *jax.eval_shape(plain, x, kernel).shape)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rows, same = PartitionSpec('data'), PartitionSpec()

  def gradients(function):
    def local(x, kernel, g):
      return jax.grad(lambda a: jnp.sum(function(*a) * g))((x, kernel))

    return jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=(rows, same, rows), out_specs=(rows, same)
      )
    )(x, kernel, g)

  got, want = map(gradients, (ours, plain))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)
