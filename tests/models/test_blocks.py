"""The blocks, the transposed convolution against the definition above all."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder, stage_plan
from rvq_jax.models.layers import (
  ResidualBlock,
  SelfAttention,
  Upsample,
  _attend_in_tiles,
)
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=RUNS_ONCE)
def init(module, x):
  return module.init(jax.random.key(0), x)


def test_upsample_has_the_parameters_and_values_of_conv_transpose():
  x = draw(0, 2, 4, 3, 5)
  ours, theirs = Upsample(6), nn.ConvTranspose(6, (4, 4), (2, 2))
  variables = jax.device_get(init(ours, x))
  shapes = jax.tree.map(
    jnp.shape, jax.eval_shape(lambda: theirs.init(jax.random.key(0), x))
  )
  assert jax.tree.map(jnp.shape, variables) == shapes
  variables['params']['bias'] = np.arange(6, dtype=np.float32)
  np.testing.assert_allclose(
    jax.jit(ours.apply)(variables, x),
    jax.jit(theirs.apply)(variables, x),
    atol=1e-5,
  )


def test_attention_sees_every_position():
  layer, x = SelfAttention(2), draw(0, 1, 3, 3, 4)
  variables = init(layer, x)
  changed = x.copy()
  changed[0, 0, 0] += [3, -1, 0, 2]
  apply = jax.jit(layer.apply)
  before, after = (np.asarray(apply(variables, a)) for a in (x, changed))
  moved = np.abs(after - before).max(-1)
  assert (moved > 1e-6).all()


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
  want = x + out.reshape(x.shape)
  np.testing.assert_allclose(
    jax.jit(layer.apply)(variables, x), want, atol=1e-5
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'scores',
  [
    2 * 5**2,
    pytest.param(1, marks=pytest.mark.slow),
    pytest.param(2**20, marks=pytest.mark.slow),
  ],
)
def test_attention_in_tiles_has_the_values_and_gradients_of_the_whole(
  scores, dtype
):
  *qkv, g = (draw(i, 3, 5, 2, 4).astype(dtype) for i in range(4))

  def values_and_gradients(f):
    values, vjp = jax.vjp(f, *qkv)
    return values, vjp(g)

  got, want = jax.jit(
    lambda: (
      values_and_gradients(functools.partial(_attend_in_tiles, scores=scores)),
      values_and_gradients(jax.nn.dot_product_attention),
    )
  )()
  tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_attention_never_holds_all_scores_on_cpu():
  layer, x = SelfAttention(2), np.zeros((2, 32, 32, 4), np.float32)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  grad = jax.grad(lambda v: jnp.sum(layer.apply(v, x)))
  compiled = jax.jit(grad).lower(variables).compile()
  scores = 4 * 2 * 2 * 1024**2  # bytes of [B, heads, T, T]
  assert compiled.memory_analysis().temp_size_in_bytes < scores


def test_attention_in_tiles_needs_no_other_device():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  where = NamedSharding(mesh, PartitionSpec('data'))
  qkv = [jax.ShapeDtypeStruct((8, 16, 4, 8), jnp.float32)] * 3

  def gradients(*qkv):
    def total(*qkv):
      return jnp.sum(_attend_in_tiles(*qkv, scores=8 * 16**2) ** 2)

    return jax.grad(total, argnums=(0, 1, 2))(*qkv)

  step = jax.jit(gradients, in_shardings=(where,) * 3, out_shardings=where)
  program = step.lower(*qkv).compile().as_text()
  assert 'while' in program  # in more than one tile
  collective = r'all-gather|all-reduce|all-to-all|collective-permute'
  assert re.findall(collective, program) == []


@pytest.mark.parametrize(
  ('factor', 'plan'),
  [
    (4, ((64, 2), (128, 2), (256, 1))),
    (8, ((64, 2), (128, 2), (256, 2))),
    (16, ((64, 2), (128, 2), (256, 2), (256, 2))),
  ],
)
def test_stage_plan_halves_log2_factor_times(factor, plan):
  assert stage_plan((64, 128, 256), factor) == plan


@pytest.mark.parametrize('factor', [0, 3, 12, 128, -8])
def test_stage_plan_refuses_other_factors(factor):
  with pytest.raises(ValueError, match='power of two'):
    stage_plan((64, 128, 256), factor)


def test_encoder_keeps_parameters_and_statistics_in_float32():
  encoder = Encoder((4, 8), 4, 1, 6, jnp.bfloat16)
  z, variables = jax.eval_shape(
    lambda: encoder.init_with_output(jax.random.key(0), draw(0, 2, 8, 8, 3))
  )
  assert z.dtype == jnp.bfloat16
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_a_residual_block_starts_as_the_identity():
  x = np.abs(draw(0, 2, 4, 4, 6))  # the leaky ReLU leaves it alone
  block = ResidualBlock()

  @jax.jit
  def run(variables):
    apply = functools.partial(block.apply, variables, x, mutable=True)
    return apply(False)[0], apply(True)[0]

  start = jax.jit(
    lambda key: block.init(key, x, False), compiler_options=RUNS_ONCE
  )
  for y in run(start(jax.random.key(0))):
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize('part', [Encoder, Decoder])
def test_only_the_last_norm_of_a_block_starts_at_zero(part):
  module = part(widths=(4, 6), factor=4, num_res_blocks=3)
  if part is Decoder:
    module = module.clone(num_heads=2)

  @jax.jit
  def scales():
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params'])
      if path[-1].key == 'scale'
    }

  scales = {name: set(np.ravel(leaf)) for name, leaf in scales().items()}
  zero = {f'block{i}/norm1/bn/scale' for i in range(3)}
  assert {name for name, values in scales.items() if values == {0.0}} == zero
  assert all(scales[name] == {1.0} for name in scales.keys() - zero)


@pytest.mark.parametrize('part', [Encoder, Decoder])
def test_every_layer_computes_in_the_dtype(part):
  module = part(widths=(4, 8), factor=2, num_res_blocks=1, dtype=jnp.bfloat16)
  if part is Decoder:
    module = module.clone(num_heads=2)
  found = {}

  def record(call, arguments, keywords, context):
    y = call(*arguments, **keywords)
    if context.module.path and context.method_name == '__call__':
      found['/'.join(context.module.path)] = y.dtype
    return y

  with nn.intercept_methods(record):
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    jax.eval_shape(module.init, jax.random.key(0), x)
  assert len(found) > 8
  assert {n for n, dtype in found.items() if dtype != jnp.bfloat16} == set()


def leaky(x):
  return np.where(x > 0, x, 0.01 * x)


def test_a_residual_block_equals_its_formula():
  x = draw(0, 2, 3, 3, 4)
  block = ResidualBlock()
  shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, False))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: rng.uniform(0.5, 1.5, a.shape).astype(np.float32), shapes
  )

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
      for a in range(3)
      for b in range(3)
    )

  y = leaky(norm(convolution(np.float64(x), 0), 0))
  want = leaky(x + norm(convolution(y, 1), 1))
  got = jax.jit(lambda v, x: block.apply(v, x, False))(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_running_statistics_move_a_tenth_of_the_way():
  x = 3 + 2 * draw(0, 4, 8, 8, 3)
  encoder = Encoder((5,), 2, 0, 6)

  @jax.jit
  def run(variables):
    _, after = encoder.apply(variables, x, train=True, mutable=['batch_stats'])
    kernel = variables['params']['conv0']['kernel']
    plain = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    return after, jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', **plain
    )

  after, y = jax.device_get(run(init(encoder, x)))
  got = after['batch_stats']['norm0']['bn']
  mean, var = np.mean(y, (0, 1, 2)), np.var(y, (0, 1, 2))
  np.testing.assert_allclose(got['mean'], 0.1 * mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(got['var'], 0.9 + 0.1 * var, rtol=1e-3)
