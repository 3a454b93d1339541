"""No finite input breaks the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rvq_jax import VectorQuantizer

C = np.asarray([0.3, -0.5, 0.2, 0.7, -0.1, 0.4], np.float32)
W = np.asarray([0.9, 0.2, -0.6, 0.1, 0.5, -0.8], np.float32)
G = np.asarray([0.1, -0.7, 0.4, 0.2, -0.9, 0.3], np.float32)
DTYPES = (jnp.float32, jnp.bfloat16)
ESTIMATORS = ('rotation', 'reflection', 'ste')
MAX_SCALE = 10.0


@functools.partial(jax.jit, static_argnames='estimator')
def run(codes, z, g, estimator):
  """quantized, ids, fallback share and dL/dz for dL/d(quantized) = g."""
  layer = VectorQuantizer(
    len(codes), estimator=estimator, max_scale=MAX_SCALE, commitment_weight=0.0
  )
  size = jnp.ones(len(codes))
  book = {'embedding': codes, 'cluster_size': size, 'embedding_sum': codes}

  def loss(z):
    out = layer.apply({'codebook': book}, z)
    return jnp.sum(out.quantized.astype(jnp.float32) * g), out

  gradient, out = jax.grad(loss, has_aux=True)(z)
  return out.quantized, out.ids, out.metrics['fallback_share'], gradient


def check(codes, z, g, dtype, estimator):
  """What holds for every input; returns ids, fallback share, gradient."""
  z = z.astype(dtype)
  quantized, ids, fallback, gradient = run(codes, z, g, estimator=estimator)
  want = codes[np.asarray(ids)].astype(dtype)
  assert np.asarray(quantized).tobytes() == want.tobytes()
  gradient = np.asarray(gradient, np.float64)
  assert np.isfinite(gradient).all()
  # The cotangent reaches the layer in the dtype of its output.
  g = np.asarray(g.astype(dtype), np.float64)
  bound = (1.0 if estimator == 'ste' else MAX_SCALE) * np.linalg.norm(
    g, axis=-1
  )
  assert (np.linalg.norm(gradient, axis=-1) <= bound * 1.01 + 1e-30).all()
  return ids, float(fallback), gradient


@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'bfloat16'])
def test_edge_inputs_give_the_lowest_code_and_a_bounded_gradient(
  dtype, estimator
):
  codes = np.stack([0 * C, C, W, W])
  rows = [C, 2 * C, -C, -(1 + 1e-6) * C, 0 * C, W, 1e-12 * C, 1e6 * C]
  z = np.float32(rows)
  g = np.stack([G] * len(rows))
  ids, fallback, _ = check(codes, z, g, dtype, estimator)
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


def floats(shape):
  return arrays.arrays(
    np.float32, shape, elements=st.floats(-1e6, 1e6, width=32)
  )


@given(
  codes=floats((4, 6)),
  z=floats((4, 6)),
  g=arrays.arrays(np.float32, (4, 6), elements=st.floats(-1, 1, width=16)),
  dtype=st.sampled_from(DTYPES),
  estimator=st.sampled_from(ESTIMATORS),
)
@settings(max_examples=150, deadline=None)
def test_any_vectors_give_codes_and_a_bounded_gradient(
  codes, z, g, dtype, estimator
):
  check(codes, z, g, dtype, estimator)
