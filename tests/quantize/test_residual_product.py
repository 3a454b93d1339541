"""Residual depth and heads: several codes per position."""

import functools

import numpy as np
import pytest
from layer_programs import decode, evaluate, init, nearest, random, train

from rvq_jax import ProductQuantizer, ResidualQuantizer, VectorQuantizer

Z = random(0, 2, 24, 6)
K = 8
# Shared: each other layer is another handful of programs.
RESIDUAL = ResidualQuantizer(K, depth=3, decay=0.8)
PRODUCT = ProductQuantizer(K, heads=2)


# One signature each: a default argument left out would be another program.
@functools.cache
def trained(layer):
  variables = init(layer, Z)
  for _ in range(3):
    _, variables = train(layer, variables, Z)
  return variables


def test_the_pieces_of_a_product_with_cosine_are_of_unit_norm():
  got = PRODUCT.clone(cosine=True).normed(7 * Z)
  pieces = Z.reshape(2, 24, 2, 3)
  want = pieces / np.linalg.norm(pieces, axis=-1, keepdims=True)
  np.testing.assert_allclose(got, want.reshape(Z.shape), rtol=1e-5)
  np.testing.assert_array_equal(PRODUCT.normed(Z), Z)


def test_residual_codes_are_the_greedy_ones():
  variables = trained(RESIDUAL)
  out, _ = evaluate(RESIDUAL, variables, Z)
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
  variables = init(layer, Z)
  for seed in range(4):
    _, variables = train(layer, variables, random(seed, *Z.shape))
  for d in range(2):
    book = variables['codebook'][f'level_{d}']
    used = np.asarray(book['cluster_size']) > 0
    lengths = np.linalg.norm(book['embedding'], axis=1)[used]
    assert used.sum() >= 40 and np.mean(lengths > 0.01) > 0.9


def test_residual_decodes_a_prefix_of_its_codes():
  variables = trained(RESIDUAL)
  out, _ = evaluate(RESIDUAL, variables, Z)
  for d in (1, 2, 3):
    expected = np.zeros_like(Z)
    for i in range(d):
      codes = np.asarray(variables['codebook'][f'level_{i}']['embedding'])
      expected = expected + codes[np.asarray(out.ids)[..., i]]
    got = decode(RESIDUAL, variables, np.asarray(out.ids)[..., :d])
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(got, out.quantized)


def test_residual_of_depth_one_is_the_plain_quantizer():
  plain = trained(RESIDUAL)['codebook']['level_0']
  one = ResidualQuantizer(codebook_size=K, depth=1)
  got, _ = evaluate(one, {'codebook': {'level_0': plain}}, Z)
  expected, _ = evaluate(VectorQuantizer(K), {'codebook': plain}, Z)
  np.testing.assert_array_equal(np.asarray(got.ids)[..., 0], expected.ids)
  np.testing.assert_array_equal(got.quantized, expected.quantized)
  np.testing.assert_allclose(got.loss, expected.loss)


def test_residual_learns_to_leave_less():
  variables = init(RESIDUAL, Z)
  for _ in range(40):
    _, variables = train(RESIDUAL, variables, Z)
  error = evaluate(RESIDUAL, variables, Z)[0].metrics
  errors = [float(error[f'quantization_error_{d}']) for d in (1, 2, 3)]
  assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
  assert errors[2] == float(error['quantization_error'])


def test_product_codes_are_the_nearest_of_each_piece():
  variables = trained(PRODUCT)
  out, _ = evaluate(PRODUCT, variables, Z)
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
