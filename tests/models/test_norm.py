"""GroupNorm and the activations of the recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.models.layers import Norm, ResidualBlock, num_groups
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE


@pytest.mark.parametrize(
  ('channels', 'groups'), [(3, 1), (8, 2), (64, 16), (128, 32), (256, 32)]
)
def test_groups_are_32_or_a_quarter_of_few_channels(channels, groups):
  assert num_groups(channels) == groups


@pytest.mark.parametrize('channels', [14, 130])
def test_channels_that_the_groups_do_not_divide_are_refused(channels):
  with pytest.raises(ValueError, match=f'got {channels}'):
    num_groups(channels)


def test_group_norm_equals_its_formula_and_has_no_statistics():
  x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
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
  np.testing.assert_allclose(
    got, y.reshape(x.shape) * scale + bias, rtol=1e-4, atol=1e-5
  )
  assert (
    Norm(jnp.bfloat16, kind='group').apply(variables, x, train=False).dtype
    == jnp.bfloat16
  )


def test_a_block_of_group_norm_starts_as_the_identity():
  x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
  block = ResidualBlock(norm='group', activation='swish')
  start = jax.jit(
    lambda key: block.init(key, x, True), compiler_options=RUNS_ONCE
  )
  variables = start(jax.random.key(0))
  y = jax.jit(lambda variables: block.apply(variables, x, True))(variables)
  np.testing.assert_allclose(y, x / (1 + np.exp(-x)), rtol=1e-5)
  assert 'batch_stats' not in variables


@pytest.mark.parametrize('part', [Encoder, Decoder])
def test_norm_and_activation_are_those_of_every_layer(part):
  options = {'widths': (8, 8), 'factor': 4, 'num_res_blocks': 1}
  if part is Decoder:
    options['num_heads'] = 2
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  module = part(**options, norm='group', activation='swish')
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  assert list(variables) == ['params']
  program = str(jax.make_jaxpr(module.apply)(variables, x))
  other = part(**options, norm='group')
  assert 'logistic' in program and ' = ge ' not in program
  assert 'logistic' not in str(jax.make_jaxpr(other.apply)(variables, x))
