"""The blocks of encoder and decoder against formulas; their refusals."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path
from tiny_model import init

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder, stage_plan
from rvq_jax.models.layers import (
  Norm,
  ResidualBlock,
  SelfAttention,
  _attend_in_tiles,
  num_groups,
)

PARTS = pytest.mark.parametrize(
  'part', [Encoder, functools.partial(Decoder, num_heads=2)]
)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
  variables = init.eval_shape(layer, x)
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


@PARTS
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    *(
      ({'factor': factor}, f'factor: expected one of 2, 4, 8.*, got {factor}')
      for factor in (0, 3, 12, 128, -8)
    ),
    ({'widths': ()}, r'widths: expected integers .*, got \(\)'),
    ({'num_res_blocks': -1}, 'num_res_blocks: .* from 0 to 1000, got -1'),
    ({'remat': 1}, 'remat: expected True or False, got 1'),
    ({'norm': 'layer'}, "norm: expected one of batch, group, got 'layer'"),
    ({'activation': 'relu'}, 'activation: expected one of leaky_relu, swish'),
    ({'norm': 'group', 'widths': (14,)}, 'norm: .* 3 groups .*, got 14;'),
    ({'norm': 'group', 'widths': (130,)}, 'norm: .* 32 groups .*, got 130;'),
  ],
)
def test_impossible_encoders_and_decoders_are_refused(part, fields, message):
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  with pytest.raises(ValueError, match=f'^{message}'):
    init.eval_shape(part(**fields), x)


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


@PARTS
def test_only_the_last_norm_of_a_block_starts_at_zero(part):
  module = part(widths=(4, 6), factor=4, num_res_blocks=3)
  params = init(module, jnp.zeros((1, 8, 8, 3)))['params']
  scales = {
    keystr(path, simple=True, separator='/'): set(np.ravel(leaf))
    for path, leaf in tree_leaves_with_path(params)
    if path[-1].key == 'scale'
  }
  zero = {f'block{i}/norm1/bn/scale' for i in range(3)}
  assert {name for name, values in scales.items() if values == {0.0}} == zero
  assert all(scales[name] == {1.0} for name in scales.keys() - zero)


@PARTS
def test_every_layer_computes_in_the_dtype(part):
  module = part(widths=(4, 8), factor=2, num_res_blocks=1, dtype=jnp.bfloat16)
  dtypes = {}

  def record(call, arguments, keywords, context):
    y = call(*arguments, **keywords)
    if context.module.path and context.method_name == '__call__':
      dtypes['/'.join(context.module.path)] = y.dtype
    return y

  with nn.intercept_methods(record):
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    init.eval_shape(module, x)
  assert len(dtypes) > 8 and set(dtypes.values()) == {jnp.dtype('bfloat16')}


def test_a_residual_block_equals_its_formula():
  x = draw(0, 2, 3, 3, 4)
  block = ResidualBlock()
  shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, False))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: rng.uniform(0.5, 1.5, a.shape).astype(np.float32), shapes
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
      for a in range(3)
      for b in range(3)
    )

  y = leaky(norm(convolution(np.float64(x), 0), 0))
  want = leaky(x + norm(convolution(y, 1), 1))
  got = jax.jit(lambda v, x: block.apply(v, x, False))(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('channels', 'groups'), [(3, 1), (8, 2), (64, 16), (128, 32), (256, 32)]
)
def test_groups_are_32_or_a_quarter_of_few_channels(channels, groups):
  assert num_groups(channels) == groups


def test_group_norm_equals_its_formula_and_has_no_statistics():
  x = draw(0, 2, 3, 5, 8)
  layer = Norm(kind='group')
  variables = layer.init(jax.random.key(0), x, train=True)
  assert list(variables) == ['params']
  scale = np.linspace(0.5, 2, 8, dtype=np.float32)
  bias = np.linspace(-1, 1, 8, dtype=np.float32)
  variables = {'params': {'gn': {'scale': scale, 'bias': bias}}}
  y = np.float64(x).reshape(2, 15, 2, 4)
  y -= y.mean((1, 3), keepdims=True)
  y /= np.sqrt((y**2).mean((1, 3), keepdims=True) + 1e-6)
  got = layer.apply(variables, x, train=True)
  want = y.reshape(x.shape) * scale + bias
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  half = Norm(kind='group', dtype=jnp.bfloat16)
  assert half.apply(variables, x, train=False).dtype == jnp.bfloat16


@PARTS
def test_every_layer_has_the_norm_and_the_activation(part):
  options = {'widths': (8, 8), 'factor': 4, 'num_res_blocks': 1}
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  module = part(**options, norm='group', activation='swish')
  variables = init.eval_shape(module, x)
  assert list(variables) == ['params']
  program = str(jax.make_jaxpr(module.apply)(variables, x))
  other = part(**options, norm='group')
  assert 'logistic' in program and ' = ge ' not in program
  assert 'logistic' not in str(jax.make_jaxpr(other.apply)(variables, x))


def test_running_statistics_move_a_tenth_of_the_way():
  x = 3 + 2 * draw(0, 4, 8, 8, 3)
  encoder = Encoder(widths=(5,), factor=2, num_res_blocks=0, code_dim=6)

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
