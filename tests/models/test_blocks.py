"""Each layer against its formula or Flax's own."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_model import init

from rvq_jax.models.layers import (
  Norm,
  ResidualBlock,
  SelfAttention,
  Upsample,
  _attend_in_tiles,
  num_groups,
  upsample,
)

ROWS, SLOW = PartitionSpec('data'), pytest.mark.slow


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(got, want, tolerance):
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def make_mesh():
  return jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))


def test_attention_equals_the_softmax_formula():
  layer, x = SelfAttention(2), draw(0, 1, 2, 3, 4)
  variables = init(layer, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
  y = x.reshape(6, 4).astype(np.float64)
  y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-6)
  q, k, v = (
    np.einsum('nc,chd->hnd', y, p[n]['kernel'])
    for n in ('query', 'key', 'value')
  )
  weight = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(2))
  weight /= weight.sum(-1, keepdims=True)
  out = np.einsum('hnd,hdc->nc', weight @ v, p['out']['kernel'])
  got = jax.jit(layer.apply)(variables, x)
  np.testing.assert_allclose(got, x + out.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'scores',
  [2 * 5**2, pytest.param(1, marks=SLOW), pytest.param(2**20, marks=SLOW)],
)
def test_attention_in_tiles_has_the_values_and_gradients_of_the_whole(
  scores, dtype
):
  *qkv, g = (draw(i, 3, 5, 2, 4).astype(dtype) for i in range(4))

  @jax.jit
  def values_and_gradients():
    tiles = functools.partial(_attend_in_tiles, scores=scores)
    pairs = (jax.vjp(f, *qkv) for f in (tiles, jax.nn.dot_product_attention))
    return [(values, vjp(g)) for values, vjp in pairs]

  assert_same(*values_and_gradients(), 1e-5 if dtype == jnp.float32 else 5e-2)


def test_attention_never_holds_all_scores_on_cpu():
  layer, x = SelfAttention(2), np.zeros((2, 32, 32, 4), np.float32)
  variables = init.eval_shape(layer, x)
  grad = jax.grad(lambda v: jnp.sum(layer.apply(v, x)))
  compiled = jax.jit(grad).lower(variables).compile()
  scores = 4 * 2 * 2 * 1024**2  # bytes of [B, heads, T, T]
  assert compiled.memory_analysis().temp_size_in_bytes < scores


def test_attention_in_tiles_needs_no_other_device():
  where = NamedSharding(make_mesh(), ROWS)
  qkv = [jax.ShapeDtypeStruct((8, 16, 4, 8), jnp.float32)] * 3

  def total(*qkv):
    return jnp.sum(_attend_in_tiles(*qkv, scores=8 * 16**2) ** 2)

  gradients = jax.grad(total, argnums=(0, 1, 2))
  step = jax.jit(gradients, in_shardings=(where,) * 3, out_shardings=where)
  program = step.lower(*qkv).compile().as_text()
  assert 'while' in program  # in more than one tile
  collective = r'all-gather|all-reduce|all-to-all|collective-permute'
  assert re.findall(collective, program) == []


@pytest.mark.parametrize(
  ('norm', 'activation', 'applied'),
  [
    ('batch', 'leaky_relu', lambda x: np.where(x > 0, x, np.float32(0.01) * x)),
    ('group', 'swish', lambda x: x / (1 + np.exp(-x))),
  ],
)
def test_a_residual_block_starts_as_the_identity(norm, activation, applied):
  x = draw(0, 2, 4, 4, 8)
  block = ResidualBlock(norm=norm, activation=activation)

  @jax.jit
  def run(variables):
    apply = functools.partial(block.apply, variables, x, mutable=True)
    return apply(False)[0], apply(True)[0]

  for y in run(init(block, x, train=False)):
    np.testing.assert_allclose(y, applied(x), rtol=1e-5, atol=1e-8)


def test_a_residual_block_equals_its_formula():
  x = draw(0, 2, 3, 3, 4)
  block = ResidualBlock()
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: rng.uniform(0.5, 1.5, a.shape).astype(np.float32),
    init.eval_shape(block, x, train=False),
  )

  def leaky(x):
    return np.where(x > 0, x, 0.01 * x)

  def norm(y, i):
    stats = variables['batch_stats'][f'norm{i}']['bn']
    affine = variables['params'][f'norm{i}']['bn']
    y = (y - stats['mean']) / np.sqrt(np.float64(stats['var']) + 1e-5)
    return y * affine['scale'] + affine['bias']

  def convolution(y, i):
    kernel = np.float64(variables['params'][f'conv{i}']['kernel'])
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
      padded[:, a : a + 3, b : b + 3] @ kernel[a, b]
      for a, b in np.ndindex(3, 3)
    )

  y = leaky(norm(convolution(np.float64(x), 0), 0))
  want = leaky(x + norm(convolution(y, 1), 1))
  got = jax.jit(lambda v, x: block.apply(v, x, False))(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_groups_are_32_or_a_quarter_of_few_channels():
  channels = 3, 8, 64, 128, 256
  assert [num_groups(c) for c in channels] == [1, 2, 16, 32, 32]


def test_group_norm_equals_its_formula():
  x = draw(0, 2, 3, 5, 8)
  scale = np.linspace(0.5, 2, 8, dtype=np.float32)
  bias = np.linspace(-1, 1, 8, dtype=np.float32)
  variables = {'params': {'gn': {'scale': scale, 'bias': bias}}}
  y = np.float64(x).reshape(2, 15, 2, 4)
  y -= y.mean((1, 3), keepdims=True)
  y /= np.sqrt((y**2).mean((1, 3), keepdims=True) + 1e-6)
  got = Norm(kind='group').apply(variables, x, train=True)
  want = y.reshape(x.shape) * scale + bias
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shape', [(2, 3, 5, 4), (1, 1, 1, 1), (1, 1, 4, 2)])
def test_upsample_adds_each_input_times_the_flipped_kernel(shape):
  x, kernel = draw(0, *shape), draw(1, 4, 4, shape[-1], 3)
  batch, height, width, _ = shape
  want = np.zeros((batch, 2 * height + 2, 2 * width + 2, 3))
  for i, j in np.ndindex(height, width):
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
  assert_same(got, want, 1e-4)


def test_the_kernel_gradient_is_summed_over_devices():
  x, kernel, g = draw(0, 8, 3, 3, 4), draw(1, 4, 4, 4, 3), draw(2, 8, 6, 6, 3)
  same = PartitionSpec()

  def gradients(x, kernel, g):
    return jax.grad(lambda a: jnp.sum(upsample(*a) * g))((x, kernel))

  shared = jax.shard_map(
    gradients,
    mesh=make_mesh(),
    in_specs=(ROWS, same, ROWS),
    out_specs=(ROWS, same),
  )
  assert_same(*(jax.jit(f)(x, kernel, g) for f in (shared, gradients)), 1e-4)
