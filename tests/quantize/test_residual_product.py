"""Residual depth and heads: several codes per position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax import ProductQuantizer, ResidualQuantizer, VectorQuantizer, rotate
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE

Z = np.random.default_rng(0).normal(size=(2, 24, 6)).astype(np.float32)
K = 8
# Shared: each other layer is another handful of programs.
RESIDUAL = ResidualQuantizer(K, depth=3, decay=0.8)
PRODUCT = ProductQuantizer(K, heads=2)
EACH = pytest.mark.parametrize(
  'layer', [RESIDUAL, PRODUCT], ids=['residual', 'product']
)


@functools.partial(
  jax.jit, static_argnames=('layer', 'train'), compiler_options=RUNS_ONCE
)
def init(layer, train=True):
  return layer.init(jax.random.key(0), Z, train=train)


@functools.partial(jax.jit, static_argnames='layer')
def _step(layer, variables, z, mask):
  out, updates = layer.apply(
    variables, z, train=True, mask=mask, mutable=['codebook']
  )
  return out, variables | updates


@functools.partial(jax.jit, static_argnames='layer')
def _evaluate(layer, variables):
  return layer.apply(variables, Z, mutable=['codebook', 'params'])


# One signature each: a default argument left out would be another program.
def step(layer, variables, z=Z, mask=None):
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _step(layer, variables, z, mask)


def evaluate(layer, variables):
  return _evaluate(layer, variables)[0]


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


@functools.cache
def trained(layer):
  variables = init(layer)
  for _ in range(3):
    _, variables = step(layer, variables)
  return variables


def nearest(e, codes):
  """Ids [N] by a plain loop in float64."""
  return np.asarray(
    [np.argmin(((codes - x[None]) ** 2).sum(1)) for x in np.float64(e)]
  )


def test_residual_codes_are_the_greedy_ones():
  variables = trained(RESIDUAL)
  out = evaluate(RESIDUAL, variables)
  left = np.float64(Z.reshape(-1, 6))
  for d in range(3):
    codes = np.asarray(variables['codebook'][f'level_{d}']['embedding'])
    ids = nearest(left, codes)
    np.testing.assert_array_equal(np.ravel(np.asarray(out.ids)[..., d]), ids)
    np.testing.assert_array_equal(
      np.asarray(out.counts)[d], np.bincount(ids, minlength=K)
    )
    left -= codes[ids]
    np.testing.assert_allclose(
      out.metrics[f'quantization_error_{d + 1}'], np.mean(left**2), rtol=1e-5
    )


@pytest.mark.parametrize(
  'threshold', [0.0, pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_levels_of_more_codes_than_vectors_are_filled_with_residuals(threshold):
  layer = ResidualQuantizer(
    codebook_size=64, depth=2, dead_code_threshold=threshold
  )
  variables = init(layer)
  for seed in range(4):
    z = np.random.default_rng(seed).normal(size=Z.shape).astype(np.float32)
    _, variables = step(layer, variables, z=z)
  for d in range(2):
    book = variables['codebook'][f'level_{d}']
    used = np.asarray(book['cluster_size']) > 0
    lengths = np.linalg.norm(book['embedding'], axis=1)[used]
    assert used.sum() >= 40 and np.mean(lengths > 0.01) > 0.9


def test_residual_decodes_a_prefix_of_its_codes():
  variables = trained(RESIDUAL)
  out = evaluate(RESIDUAL, variables)
  for d in (1, 2, 3):
    expected = np.zeros_like(Z)
    for i in range(d):
      codes = np.asarray(variables['codebook'][f'level_{i}']['embedding'])
      expected = expected + codes[np.asarray(out.ids)[..., i]]
    got = decode(RESIDUAL, variables, np.asarray(out.ids)[..., :d])
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(got, out.quantized)


def test_residual_gradient_is_one_rotation_onto_the_sum():
  layer, variables = RESIDUAL, trained(RESIDUAL)
  g = np.random.default_rng(1).normal(size=Z.shape).astype(np.float32)

  @jax.jit
  def gradients(z):
    q = layer.apply(variables, z).quantized
    through = jax.grad(
      lambda z: jnp.sum(layer.apply(variables, z).quantized * g)
    )
    return through(z), jax.grad(lambda z: jnp.sum(rotate(z, q) * g))(z)

  got, expected = gradients(Z)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
  assert np.abs(np.asarray(got) - g).max() > 0.1  # not straight-through


def test_residual_straight_through_gradient_does_not_grow_with_depth():
  layer, variables = RESIDUAL.clone(estimator='ste'), trained(RESIDUAL)
  gradient = jax.jit(
    jax.grad(lambda z: jnp.sum(layer.apply(variables, z).quantized))
  )(Z)
  np.testing.assert_array_equal(gradient, np.ones_like(Z))


def test_residual_of_depth_one_is_the_plain_quantizer():
  plain = trained(RESIDUAL)['codebook']['level_0']
  one = ResidualQuantizer(codebook_size=K, depth=1)
  got = evaluate(one, {'codebook': {'level_0': plain}})
  expected = evaluate(VectorQuantizer(codebook_size=K), {'codebook': plain})
  np.testing.assert_array_equal(np.asarray(got.ids)[..., 0], expected.ids)
  np.testing.assert_array_equal(got.quantized, expected.quantized)
  np.testing.assert_allclose(got.loss, expected.loss)


def test_residual_learns_to_leave_less():
  variables = init(RESIDUAL)
  for _ in range(40):
    _, variables = step(RESIDUAL, variables)
  error = evaluate(RESIDUAL, variables).metrics
  errors = [float(error[f'quantization_error_{d}']) for d in (1, 2, 3)]
  assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
  assert errors[2] == float(error['quantization_error'])


def test_product_codes_are_the_nearest_of_each_piece():
  variables = trained(PRODUCT)
  out = evaluate(PRODUCT, variables)
  assert out.ids.shape == (2, 24, 2)
  for h in range(2):
    codes = np.asarray(variables['codebook'][f'head_{h}']['embedding'])
    ids = nearest(Z.reshape(-1, 2, 3)[:, h], codes)
    np.testing.assert_array_equal(np.ravel(np.asarray(out.ids)[..., h]), ids)
    np.testing.assert_array_equal(
      np.asarray(out.quantized).reshape(-1, 2, 3)[:, h], codes[ids]
    )
    np.testing.assert_array_equal(
      np.asarray(out.counts)[h], np.bincount(ids, minlength=K)
    )


@pytest.mark.parametrize(
  'layer',
  [
    RESIDUAL,
    PRODUCT,
    *(
      pytest.param(make(K, code_dim=4, ema=ema), marks=pytest.mark.slow)
      for make in (ResidualQuantizer, ProductQuantizer)
      for ema in (True, False)
    ),
  ],
)
def test_ids_give_back_what_the_forward_pass_gave(layer):
  variables = init(layer)
  out = evaluate(layer, variables)
  assert out.quantized.shape == Z.shape
  got = decode(layer, variables, out.ids)
  np.testing.assert_array_equal(got, out.quantized)
  codes = out.ids.shape[-1]
  assert out.counts.shape == (codes, K)
  assert np.sum(out.counts) == codes * 48


@EACH
def test_training_moves_every_codebook_and_evaluation_none(layer):
  variables = init(layer)
  _, after = step(layer, variables)
  for name, book in variables['codebook'].items():
    embedding = np.asarray(book['embedding'])
    assert np.any(after['codebook'][name]['embedding'] != embedding), name
  _, kept = _evaluate(layer, after)
  jax.tree.map(
    np.testing.assert_array_equal, kept['codebook'], after['codebook']
  )


@EACH
def test_masked_positions_count_nowhere(layer):
  variables = trained(layer)
  mask = np.arange(48).reshape(2, 24) % 3 > 0
  wild = np.where(mask[..., None], Z, 1e4).astype(np.float32)
  one, after_one = step(layer, variables, Z, mask)
  two, after_two = step(layer, variables, wild, mask)
  np.testing.assert_array_equal(one.counts, two.counts)
  np.testing.assert_array_equal(one.loss, two.loss)
  jax.tree.map(
    np.testing.assert_array_equal, after_one['codebook'], after_two['codebook']
  )
  assert np.sum(one.counts) == mask.sum() * one.ids.shape[-1]


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    (ResidualQuantizer(codebook_size=K, cosine=True), 'cosine=False'),
    (ResidualQuantizer(codebook_size=K, depth=0), 'depth: expected'),
    (ProductQuantizer(codebook_size=K, heads=4), 'heads divide, got 6'),
    (ProductQuantizer(codebook_size=K, heads=1.5), 'an integer'),
  ],
)
def test_impossible_arguments_are_refused(layer, message):
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), Z)


@pytest.mark.parametrize(('layer', 'codes'), [(RESIDUAL, 4), (PRODUCT, 1)])
def test_ids_of_another_number_of_codes_are_refused(layer, codes):
  variables = init(layer)
  with pytest.raises(ValueError, match='expected ids'):
    layer.apply(
      variables, np.zeros((4, codes), np.int32), method='codes_from_ids'
    )
