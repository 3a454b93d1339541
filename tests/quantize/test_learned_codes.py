"""Learned codes: a parameter that the loss moves, an offset for the rest."""

import functools

import jax
import numpy as np
import pytest

from rvq_jax import ProductQuantizer, VectorQuantizer
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE

Z = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
K = 8


@functools.partial(jax.jit, static_argnames='layer')
def _train(layer, variables, z):
  out, updates = layer.apply(variables, z, train=True, mutable=['codebook'])
  return out, variables | updates


# One signature: a default argument left out would be another program.
def train(layer, variables, z=Z):
  return _train(layer, variables, z)


def make(cls=VectorQuantizer, **arguments):
  layer = cls(codebook_size=K, ema=False, **arguments)
  init = jax.jit(layer.init, compiler_options=RUNS_ONCE)
  return layer, init(jax.random.key(0), Z)


def codes_of(variables):
  return np.asarray(
    variables['params']['embedding'] + variables['codebook']['offset']
  )


def test_the_first_batch_fills_them_and_leaves_the_parameter():
  layer, variables = make(dead_code_threshold=0.0)
  _, filled = train(layer, variables)
  rows = {tuple(row) for row in Z.round(4)}
  assert all(tuple(code) in rows for code in codes_of(filled).round(4))
  np.testing.assert_array_equal(
    filled['params']['embedding'], variables['params']['embedding']
  )
  _, later = train(layer, filled, Z + 100)
  np.testing.assert_array_equal(codes_of(later), codes_of(filled))


def test_the_second_step_is_no_other_program():
  def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

  layer, variables = make()
  _, after = jax.eval_shape(functools.partial(train, layer), variables)
  assert types(after) == types(variables)


@pytest.mark.parametrize('cosine', [False, True])
def test_dead_ones_come_back_to_the_data(cosine):
  layer, variables = make(
    init_from='normal', dead_code_threshold=0.5, cosine=cosine
  )
  far = np.full((K, 6), 1e3, np.float32)
  far[0] = Z[0]
  variables['params']['embedding'] = far
  variables['codebook']['cluster_size'] = 8.0 * (np.arange(K) == 0)
  out, after = train(layer, variables)
  assert out.metrics['replaced_codes'] == K - 1
  assert train(layer, after)[0].metrics['usage'] > 0.7


def test_their_sizes_are_a_moving_average_of_the_counts():
  layer, variables = make(
    init_from='normal', decay=0.75, dead_code_threshold=0.0
  )
  out, after = train(layer, variables)
  before = variables['codebook']['cluster_size']
  np.testing.assert_allclose(before, 64 / K)
  want = 0.75 * before + 0.25 * np.asarray(out.counts)
  np.testing.assert_allclose(after['codebook']['cluster_size'], want, rtol=1e-6)


@pytest.mark.parametrize(
  ('cls', 'cosine'), [(VectorQuantizer, False), (ProductQuantizer, True)]
)
def test_ids_stand_for_the_filled_codes(cls, cosine):
  layer, variables = make(cls, cosine=cosine, dead_code_threshold=0.0)
  _, variables = train(layer, variables)
  out = jax.jit(layer.apply)(variables, Z)
  decode = functools.partial(layer.apply, method='codes_from_ids')
  got = jax.jit(decode)(variables, out.ids)
  assert np.asarray(got).tobytes() == np.asarray(out.quantized).tobytes()
