"""The blocks, the transposed convolution against the definition above all."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rvq_jax.models.encoder import Encoder, stage_plan
from rvq_jax.models.layers import SelfAttention, Upsample, _attend_in_tiles


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_upsample_has_the_parameters_and_values_of_conv_transpose():
  x = draw(0, 2, 4, 3, 5)
  ours, theirs = Upsample(6), nn.ConvTranspose(6, (4, 4), (2, 2))
  variables = jax.jit(ours.init)(jax.random.key(0), x)
  shapes = jax.tree.map(
    jnp.shape, jax.eval_shape(lambda: theirs.init(jax.random.key(0), x))
  )
  assert jax.tree.map(jnp.shape, variables) == shapes
  variables['params']['bias'] = jnp.arange(6.0)
  np.testing.assert_allclose(
    jax.jit(ours.apply)(variables, x),
    jax.jit(theirs.apply)(variables, x),
    atol=1e-5,
  )


def test_upsample_lowers_to_a_convolution_on_cuda_and_none_on_cpu():
  layer, x = Upsample(6), jnp.zeros((2, 4, 4, 5))
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  traced = jax.jit(layer.apply).trace(variables, x)
  assert 'convolution' not in traced.lower().as_text()
  cuda = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'stablehlo.convolution' in cuda


def test_attention_sees_every_position():
  layer, x = SelfAttention(2), draw(0, 1, 3, 3, 4)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  change = jnp.zeros_like(x).at[0, 0, 0].set(jnp.asarray([3.0, -1, 0, 2]))
  apply = jax.jit(layer.apply)
  moved = np.abs(apply(variables, x + change) - apply(variables, x)).max(-1)
  assert (moved > 1e-6).all()


def test_attention_equals_the_softmax_formula():
  layer, x = SelfAttention(2), draw(0, 1, 2, 3, 4)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
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
@pytest.mark.parametrize('scores', [1, 2 * 5**2, 2**20])
def test_attention_in_tiles_has_the_values_and_gradients_of_the_whole(
  scores, dtype
):
  *qkv, g = (jnp.asarray(draw(i, 3, 5, 2, 4), dtype) for i in range(4))

  def values_and_gradients(f):
    return jax.jit(lambda a: jax.vjp(lambda a: f(*a), a)[1](g) + (f(*a),))(qkv)

  got = values_and_gradients(lambda *a: _attend_in_tiles(*a, scores=scores))
  want = values_and_gradients(jax.nn.dot_product_attention)
  tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_attention_never_holds_all_scores_on_cpu():
  layer, x = SelfAttention(2), jnp.zeros((2, 32, 32, 4))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  grad = jax.grad(lambda v: jnp.sum(layer.apply(v, x)))
  compiled = jax.jit(grad).lower(variables).compile()
  scores = 4 * 2 * 2 * 1024**2  # bytes of [B, heads, T, T]
  assert compiled.memory_analysis().temp_size_in_bytes < scores


def test_attention_in_tiles_needs_no_other_device():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  where = NamedSharding(mesh, PartitionSpec('data'))
  qkv = [jnp.zeros((8, 16, 4, 8))] * 3

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
  x = draw(0, 2, 8, 8, 3)
  variables = jax.jit(encoder.init)(jax.random.key(0), x)
  z = jax.jit(encoder.apply)(variables, x)
  assert z.dtype == jnp.bfloat16
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
