"""No finite input breaks the layer: its edge cases by name, and drawn ones."""

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


CASES = {
  'zero vector': (0 * C, C),
  'zero code': (C, 0 * C),
  'both zero': (0 * C, 0 * C),
  'e equals q': (C, C),
  'parallel': (3 * C, C),
  'antipodal': (-C, C),
  **{
    f'antipodal but for 1e-{n}': (-C + np.float32(10.0**-n) * W, C)
    for n in range(2, 8)
  },
  **{f'|e| about 1e{n}': (W * np.float32(10.0**n), C) for n in (-12, -6, 3, 6)},
  **{f'|q| about 1e{n}': (W, C * np.float32(10.0**n)) for n in (-12, -6, 3, 6)},
  'subnormal vector': (C * np.float32(1e-39), C),
  'D = 1': (W[:1], C[:1]),
  'D = 1, antipodal': (-C[:1], C[:1]),
  'D = 2': (W[:2], C[:2]),
  'D = 2, antipodal': (-C[:2], C[:2]),
}
# Where the rotation falls back in float32: no length, or 1 + u.v under eps.
STRAIGHT_THROUGH = {
  *('zero vector', 'zero code', 'both zero', 'subnormal vector'),
  *('antipodal', 'D = 1, antipodal', 'D = 2, antipodal'),
  *(f'antipodal but for 1e-{n}' for n in range(4, 8)),
}


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    pytest.param(
      *(case, dtype),
      id=f'{case}-{np.dtype(dtype)}',
      marks=pytest.mark.slow
      if case[0] == 'D' and dtype == jnp.bfloat16
      else (),
    )
    for case in CASES
    for dtype in DTYPES
  ],
)
def test_one_vector_and_one_code(case, dtype):
  e, q = CASES[case]
  g = G[: len(e)]
  for estimator in ESTIMATORS:
    _, fallback, gradient = check(q[None], e[None], g[None], dtype, estimator)
    if estimator == 'rotation' and dtype == jnp.float32:
      assert fallback == (case in STRAIGHT_THROUGH)
      if case == 'e equals q':
        np.testing.assert_allclose(gradient[0], g, rtol=1e-5)
      else:
        straight = np.array_equal(gradient[0], np.float64(g))
        assert straight == (case in STRAIGHT_THROUGH)


@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'bfloat16'])
def test_duplicated_codes_give_the_lower_index(dtype):
  codes = np.stack([W, C, C, C])
  rows, g = np.stack([C, W, C, W]), np.stack([G, G, G, G])
  ids, _, _ = check(codes, rows, g, dtype, 'rotation')
  np.testing.assert_array_equal(ids, [1, 0, 1, 0])


@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_its_own_gradient_only(bad, dtype):
  codes = np.stack([W, C, -C, -W])
  rows = np.stack([C, W, C + W, C - W])
  spoilt = rows.copy()
  spoilt[1, 2] = bad
  g = np.stack([G, G, G, G])
  whole = run(codes, rows.astype(dtype), g, estimator='rotation')
  after = run(codes, spoilt.astype(dtype), g, estimator='rotation')
  gradients = (np.asarray(x[3], np.float32)[[0, 2, 3]] for x in (after, whole))
  np.testing.assert_array_equal(*gradients)
  assert np.isfinite(np.asarray(after[0], np.float32)).all()


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
