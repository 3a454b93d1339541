"""No finite input breaks the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from layer_programs import random

from rvq_jax import VectorQuantizer

C, W, G = random(0, 3, 6)
DTYPES = (jnp.float32, jnp.bfloat16)
ESTIMATORS = ('rotation', 'reflection', 'ste')


@functools.partial(jax.jit, static_argnames='estimator')
def run(codes, z, g, estimator):
  """quantized, ids, fallback share and dL/dz for dL/d(quantized) = g."""
  layer = VectorQuantizer(4, estimator=estimator, commitment_weight=0.0)
  book = {'embedding': codes, 'embedding_sum': codes}
  book['cluster_size'] = jnp.ones(4)

  def loss(z):
    out = layer.apply({'codebook': book}, z)
    return jnp.sum(out.quantized.astype(jnp.float32) * g), out

  gradient, out = jax.grad(loss, has_aux=True)(z)
  return out.quantized, out.ids, out.metrics['fallback_share'], gradient


def check(codes, z, g, dtype, estimator):
  """What holds for every input; returns ids and the fallback share."""
  z = z.astype(dtype)
  quantized, ids, fallback, gradient = run(codes, z, g, estimator=estimator)
  want = codes[np.asarray(ids)].astype(dtype)
  assert np.asarray(quantized).tobytes() == want.tobytes()
  gradient = np.asarray(gradient, np.float64)
  assert np.isfinite(gradient).all()
  # The cotangent reaches the layer in the dtype of its output.
  length = np.linalg.norm(np.float64(g.astype(dtype)), axis=-1)
  bound = (1 if estimator == 'ste' else 10) * length
  assert (np.linalg.norm(gradient, axis=-1) <= bound * 1.01 + 1e-30).all()
  return ids, float(fallback)


@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'bfloat16'])
def test_edge_inputs_give_the_lowest_code_and_a_bounded_gradient(
  dtype, estimator
):
  codes = np.stack([0 * C, C, W, W])
  rows = [C, 2 * C, -C, -(1 + 1e-6) * C, 0 * C, W, 1e-12 * C, 1e6 * C]
  g = np.stack([G] * len(rows))
  ids, fallback = check(codes, np.float32(rows), g, dtype, estimator)
  np.testing.assert_array_equal(ids, [1, 1, 0, 0, 0, 2, 0, 1])
  assert fallback == 4 / 8  # on the code 0


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_its_own_gradient_only(bad):
  codes = np.stack([W, C, -C, -W])
  rows = np.stack([C, W, C + W, C - W])
  spoilt, g = rows.copy(), np.stack([G] * 4)
  spoilt[1, 2] = bad
  whole = run(codes, rows, g, estimator='rotation')
  after = run(codes, spoilt, g, estimator='rotation')
  gradients = (np.asarray(x[3])[[0, 2, 3]] for x in (after, whole))
  np.testing.assert_array_equal(*gradients)
  assert np.isfinite(after[0]).all()


def vectors(bound, width):
  elements = st.floats(-bound, bound, width=width)
  return arrays.arrays(np.float32, (4, 6), elements=elements)


@given(
  codes=vectors(1e6, 32),
  z=vectors(1e6, 32),
  g=vectors(1, 16),
  dtype=st.sampled_from(DTYPES),
  estimator=st.sampled_from(ESTIMATORS),
)
@settings(max_examples=150, deadline=None)
def test_any_vectors_give_codes_and_a_bounded_gradient(
  codes, z, g, dtype, estimator
):
  check(codes, z, g, dtype, estimator)
