"""The three estimators against dense float64 matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax import reflect, rotate, straight_through
from rvq_jax.quantize.gradients import geometry

ESTIMATORS = {'rotate': rotate, 'reflect': reflect, 'ste': straight_through}


def rotation_matrix(e, q):
  """R as a product in the plane of u and v, by Rodrigues' formula."""
  u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
  c = u @ v
  across = v - c * u
  s = np.linalg.norm(across)
  if s == 0:
    return np.eye(e.size)
  n = across / s
  plane = np.outer(u, u) + np.outer(n, n)
  turn = np.outer(n, u) - np.outer(u, n)
  return np.eye(e.size) + (c - 1) * plane + s * turn


def reflection_matrix(e, q):
  u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
  d = u - v
  norm = np.linalg.norm(d)
  if norm == 0:
    return np.eye(e.size)
  return np.eye(e.size) - 2 * np.outer(d / norm, d / norm)


def expected_gradient(name, e, q, g, max_scale=10.0):
  e, q, g = (np.asarray(x, np.float64) for x in (e, q, g))
  if name == 'ste':
    return g
  scale = min(np.linalg.norm(q) / np.linalg.norm(e), max_scale)
  matrix = {'rotate': rotation_matrix, 'reflect': reflection_matrix}[name]
  return scale * matrix(e, q).T @ g


@functools.partial(jax.jit, static_argnames=('name', 'max_scale'))
def values_and_gradient(name, e, q, g, **kwargs):
  out, vjp = jax.vjp(lambda e: ESTIMATORS[name](e, q, **kwargs), e)
  return out, vjp(g)[0]


def pull_back(name, e, q, g, **kwargs):
  return np.asarray(values_and_gradient(name, e, q, g, **kwargs)[1])


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('dim', [1, 2, 3, 64])
def test_gradient_equals_dense_matrix(name, dim):
  e, q, g = draw(dim, 3, 20, dim)
  got = pull_back(name, e, q, g)
  for row in range(20):
    if dim == 1 and name == 'rotate' and e[row, 0] * q[row, 0] < 0:
      np.testing.assert_array_equal(got[row], g[row])  # antipodal: STE
      continue
    want = expected_gradient(name, e[row], q[row], g[row])
    np.testing.assert_allclose(
      got[row], want, rtol=2e-4, atol=1e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize('name', ['rotate', 'reflect'])
def test_gradient_differs_from_straight_through_along_u_minus_v(name):
  e, q = draw(1, 2, 8)
  u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
  got = pull_back(name, e, q, u - v)
  ste = pull_back('ste', e, q, u - v)
  cosine = got @ ste / np.linalg.norm(got) / np.linalg.norm(ste)
  np.testing.assert_allclose(cosine, -1 if name == 'reflect' else u @ v, 1e-5)


def test_rotation_carries_e_onto_q():
  e, q = draw(2, 2, 16)
  _, image = jax.jvp(lambda e: rotate(e, q), (jnp.asarray(e),), (e,))
  np.testing.assert_allclose(image, q, rtol=1e-5, atol=1e-6)


def test_rotation_has_determinant_one_and_reflection_minus_one():
  e, q = draw(3, 2, 5)
  scale = np.linalg.norm(q) / np.linalg.norm(e)
  for estimator, sign in ((rotate, 1), (reflect, -1)):
    jacobian = jax.jit(jax.jacobian(lambda e, f=estimator: f(e, q)))(e)
    np.testing.assert_allclose(
      np.linalg.det(np.asarray(jacobian) / scale), sign, rtol=1e-4
    )


def test_rotation_tends_to_straight_through_and_reflection_does_not():
  e, noise, g = draw(4, 3, 16)
  q = e + 1e-4 * noise
  scale = np.linalg.norm(q) / np.linalg.norm(e)
  np.testing.assert_allclose(pull_back('rotate', e, q, g), scale * g, atol=1e-3)
  assert np.abs(pull_back('reflect', e, q, g) - scale * g).max() > 0.05


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_forward_is_the_code_bit_exact(name, dtype):
  e, q = draw(5, 2, 50, 7)
  got = jax.jit(ESTIMATORS[name])((1e3 * e).astype(dtype), q)
  assert np.asarray(got).tobytes() == q.tobytes()


@pytest.mark.parametrize('name', ESTIMATORS)
def test_no_gradient_reaches_the_code(name):
  e, q = draw(6, 2, 4, 3)
  gradient = jax.jit(jax.grad(lambda q: jnp.sum(ESTIMATORS[name](e, q))))
  np.testing.assert_array_equal(gradient(q), 0)


def edge_cases():
  """name -> (e, q), each [D]."""
  x = draw(7, 6)
  y = draw(8, 6)
  cases = {
    'zero_vector': (0 * x, y),
    'zero_code': (x, 0 * y),
    'both_zero': (0 * x, 0 * y),
    'equal': (x, x),
    'parallel': (x, 3 * x),
    'antipodal': (x, -2 * x),
    'dim_1': (x[:1], y[:1]),
    'dim_1_antipodal': (x[:1], -x[:1]),
    'dim_2': (x[:2], y[:2]),
    'dim_2_antipodal': (x[:2], -x[:2]),
  }
  for power in range(2, 8):
    cases[f'nearly_antipodal_1e-{power}'] = (
      x,
      -x + np.float32(10.0**-power) * y,
    )
  for power in (-12, -9, -6, -3, 3, 6):
    size = np.float32(10.0**power)
    unit_x, unit_y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    cases[f'norms_1e{power}'] = (1.1 * size * unit_x, 1.1 * size * unit_y)
    cases[f'code_norm_1e{power}'] = (x, 1.1 * size * unit_y)
    cases[f'vector_norm_1e{power}'] = (1.1 * size * unit_x, y)
  for name, size in (('smallest', 1e-45), ('largest', 3e38)):
    cases[f'{name}_float'] = (np.float32(size) * np.sign(x), y)
    cases[f'{name}_code'] = (x, np.float32(size) * np.sign(y))
  return cases


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('case', edge_cases())
def test_edge_case_is_finite_and_bounded(case, name, dtype):
  e, q = (x.astype(dtype) for x in edge_cases()[case])
  g = draw(9, *e.shape).astype(dtype)
  out, gradient = values_and_gradient(name, e, q, g)
  gradient = np.asarray(gradient, np.float64)
  assert np.asarray(out).tobytes() == q.tobytes()
  assert np.isfinite(gradient).all()
  slack = 1.0001 if dtype == jnp.float32 else 1.02
  bound = 10 * np.linalg.norm(np.asarray(g, np.float64))
  assert np.linalg.norm(gradient) <= slack * bound


@pytest.mark.parametrize('power', [-12, -9, -6, -3, 3, 6])
def test_rotation_is_right_at_extreme_norms(power):
  e, q, g = draw(10, 3, 12)
  size = 2 * np.float32(10.0**power)
  e, q = size * e / np.linalg.norm(e), size * q / np.linalg.norm(q)
  want = expected_gradient('rotate', e, q, g)
  np.testing.assert_allclose(pull_back('rotate', e, q, g), want, 1e-4, 1e-5)


@pytest.mark.parametrize(
  'case', ['zero_vector', 'zero_code', 'antipodal', 'nearly_antipodal_1e-7']
)
def test_a_vector_without_rotation_falls_back_to_straight_through(case):
  e, q = edge_cases()[case]
  g = draw(11, *e.shape)
  np.testing.assert_array_equal(pull_back('rotate', e, q, g), g)
  assert bool(jax.jit(lambda: geometry(e, q).no_rotation)()[0])


@pytest.mark.parametrize('power', [-13, -20, -40])
@pytest.mark.parametrize('short', ['vector', 'code'])
@pytest.mark.parametrize('name', ['rotate', 'reflect'])
def test_a_norm_between_zero_and_1e_12_falls_back_too(name, short, power):
  e, q, g = draw(14, 3, 6)
  tiny = np.float32(10.0**power)
  e, q = (tiny * e, q) if short == 'vector' else (e, tiny * q)
  view = jax.jit(geometry)(e, q)
  assert not view.usable and view.scale == 1
  if name == 'rotate':
    np.testing.assert_array_equal(pull_back(name, e, q, g), g)
  else:  # the reflection keeps the length
    length = np.linalg.norm(pull_back(name, e, q, g))
    np.testing.assert_allclose(length, np.linalg.norm(g), rtol=1e-5)


def test_geometry_is_constant_and_float32_whatever_the_dtype():
  e, q = draw(15, 2, 9, 4).astype(jnp.bfloat16)
  view, exact = geometry(e, q), geometry(np.float32(e), np.float32(q))
  for got, want in zip(view, exact, strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)

  def total(e, q):
    view = geometry(e, q)
    return sum(jnp.sum(x) for x in (view.u, view.v, view.scale, view.angle))

  gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(*np.float32([e, q]))
  np.testing.assert_array_equal(gradients, np.zeros((2, 9, 4)))


@pytest.mark.parametrize('power', [2, 3])
def test_near_antipodes_the_rotation_still_holds(power):
  e, noise, g = draw(12, 3, 16)
  q = -e + np.float32(10.0**-power) * noise
  want = expected_gradient('rotate', e, q, g)
  np.testing.assert_allclose(pull_back('rotate', e, q, g), want, atol=2e-3)


def test_scale_is_clipped_at_max_scale():
  e, q, g = draw(13, 3, 4)
  got = pull_back('rotate', e, 1000 * q, g, max_scale=2.5)
  np.testing.assert_allclose(
    np.linalg.norm(got), 2.5 * np.linalg.norm(g), rtol=1e-5
  )


def test_angle_lies_between_vector_and_code_and_is_0_where_undefined():
  e = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 0], [1, 0]], np.float32)
  q = np.array([[2, 0], [3, 3], [0, 1], [-1, 0], [1, 1], [0, 0]], np.float32)
  angle = jax.jit(lambda: geometry(e, q).angle)()
  np.testing.assert_allclose(
    np.rad2deg(angle)[:, 0], [0, 45, 90, 180, 0, 0], atol=1e-4
  )


@pytest.mark.parametrize('name', ESTIMATORS)
def test_shapes_that_differ_are_refused(name):
  with pytest.raises(ValueError, match='one shape'):
    ESTIMATORS[name](jnp.zeros((4, 3)), jnp.zeros((3,)))


@pytest.mark.parametrize('value', [0.0, -1.0, float('nan')])
def test_max_scale_that_is_not_positive_is_refused(value):
  with pytest.raises(ValueError, match='max_scale'):
    rotate(jnp.zeros(3), jnp.zeros(3), max_scale=value)
