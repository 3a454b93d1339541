"""The estimators against dense float64 matrices and loops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_programs import init
from layer_programs import random as draw

from rvq_jax import VectorQuantizer, reflect, rotate, straight_through
from rvq_jax.quantize.gradients import ESTIMATORS, geometry

PAPER = {'rotation': rotate, 'reflection': reflect, 'ste': straight_through}


def rotation_matrix(e, q):
  """R as a product in the plane of u and v, by Rodrigues' formula."""
  u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
  c = u @ v
  s = np.linalg.norm(v - c * u)
  n = (v - c * u) / max(s, 1e-30)
  plane = np.outer(u, u) + np.outer(n, n)
  turn = np.outer(n, u) - np.outer(u, n)
  return np.eye(e.size) + (c - 1) * plane + s * turn


def reflection_matrix(e, q):
  d = e / np.linalg.norm(e) - q / np.linalg.norm(q)
  return np.eye(e.size) - 2 * np.outer(d, d) / max(d @ d, 1e-30)


def expected_gradient(name, e, q, g, max_scale=10.0):
  e, q, g = (np.asarray(x, np.float64) for x in (e, q, g))
  scale = min(np.linalg.norm(q) / np.linalg.norm(e), max_scale)
  if name == 'ste':
    return g
  matrix = rotation_matrix if name == 'rotation' else reflection_matrix
  return scale * matrix(e, q).T @ g


@functools.partial(jax.jit, static_argnames=('name', 'max_scale'))
def values_and_gradient(name, e, q, g, **kwargs):
  out, vjp = jax.vjp(lambda e: PAPER[name](e, q, **kwargs), e)
  return out, vjp(g)[0]


def pull_back(name, e, q, g, **kwargs):
  return np.asarray(values_and_gradient(name, e, q, g, **kwargs)[1])


@pytest.mark.parametrize('name', PAPER)
@pytest.mark.parametrize('dim', [1, 2, 3, 64])
def test_gradient_equals_dense_matrix(name, dim):
  e, q, g = draw(dim, 3, 20, dim)
  got = pull_back(name, e, q, g)
  for row in range(20):
    if dim == 1 and name == 'rotation' and e[row, 0] * q[row, 0] < 0:
      np.testing.assert_array_equal(got[row], g[row])  # antipodal: STE
      continue
    want = expected_gradient(name, e[row], q[row], g[row])
    np.testing.assert_allclose(
      got[row], want, rtol=2e-4, atol=1e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize('name', ['rotation', 'reflection'])
def test_gradient_differs_from_straight_through_along_u_minus_v(name):
  e, q = draw(1, 2, 8)
  u, v = e / np.linalg.norm(e), q / np.linalg.norm(q)
  got, ste = (pull_back(x, e, q, u - v) for x in (name, 'ste'))
  cosine = got @ ste / np.linalg.norm(got) / np.linalg.norm(ste)
  want = -1 if name == 'reflection' else u @ v
  np.testing.assert_allclose(cosine, want, rtol=1e-5)


def test_rotation_tends_to_straight_through_and_reflection_does_not():
  e, noise, g = draw(4, 3, 16)
  q = e + 1e-4 * noise
  want = np.linalg.norm(q) / np.linalg.norm(e) * g
  np.testing.assert_allclose(pull_back('rotation', e, q, g), want, atol=1e-3)
  assert np.abs(pull_back('reflection', e, q, g) - want).max() > 0.05


def edge_cases():
  """name -> (e, q), each [D]."""
  x, y = draw(7, 6), draw(8, 6)
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
    near = -x + np.float32(10.0**-power) * y
    cases[f'nearly_antipodal_1e-{power}'] = (x, near)
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
@pytest.mark.parametrize('name', PAPER)
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


@pytest.mark.parametrize(
  'case', [name for name in edge_cases() if re.match('norms|.*1e-[23]$', name)]
)
def test_rotation_is_right_at_extreme_norms_and_near_antipodes(case):
  e, q = edge_cases()[case]
  g = draw(10, *e.shape)
  got = pull_back('rotation', e, q, g)
  want = expected_gradient('rotation', e, q, g)
  atol = 1e-5 if 'norm' in case else 2e-3
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
  'case', ['zero_vector', 'zero_code', 'antipodal', 'nearly_antipodal_1e-7']
)
def test_a_vector_without_rotation_falls_back_to_straight_through(case):
  e, q = edge_cases()[case]
  g = draw(11, *e.shape)
  np.testing.assert_array_equal(pull_back('rotation', e, q, g), g)
  assert bool(jax.jit(lambda: geometry(e, q).no_rotation)()[0])


@pytest.mark.parametrize('power', [-13, -20, -40])
@pytest.mark.parametrize('short', ['vector', 'code'])
@pytest.mark.parametrize('name', ['rotation', 'reflection'])
def test_a_norm_between_zero_and_1e_12_falls_back_too(name, short, power):
  e, q, g = draw(14, 3, 6)
  tiny = np.float32(10.0**power)
  e, q = (tiny * e, q) if short == 'vector' else (e, tiny * q)
  view = jax.jit(geometry)(e, q)
  assert not view.usable and view.scale == 1
  if name == 'rotation':
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


def test_scale_is_clipped_at_max_scale():
  e, q, g = draw(13, 3, 4)
  got = pull_back('rotation', e, 1000 * q, g, max_scale=2.5)
  length = 2.5 * np.linalg.norm(g)
  np.testing.assert_allclose(np.linalg.norm(got), length, rtol=1e-5)


def test_angle_lies_between_vector_and_code_and_is_0_where_undefined():
  e = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 0], [1, 0]], np.float32)
  q = np.array([[2, 0], [3, 3], [0, 1], [-1, 0], [1, 1], [0, 0]], np.float32)
  angle = jax.jit(lambda: geometry(e, q).angle)()
  want = [0, 45, 90, 180, 0, 0]
  np.testing.assert_allclose(np.rad2deg(angle)[:, 0], want, atol=1e-4)


@pytest.mark.parametrize('name', PAPER)
def test_shapes_that_differ_are_refused(name):
  with pytest.raises(ValueError, match='one shape'):
    PAPER[name](jnp.zeros((4, 3)), jnp.zeros((3,)))


@pytest.mark.parametrize('value', [0.0, -1.0, float('nan')])
def test_max_scale_that_is_not_positive_is_refused(value):
  with pytest.raises(ValueError, match='max_scale'):
    rotate(jnp.zeros(3), jnp.zeros(3), max_scale=value)


N, D, K = 24, 5, 6
E, G = draw(0, 2, N, D)
CODES = draw(1, K, D)
IDS = (np.arange(N) % 5).astype(np.int32)  # nothing chooses the last code
Q = CODES[IDS]
MASK = np.arange(N) % 7 > 0


def pull(name, e, q, g, ids, mask, axis_name=None):
  """The value, and the gradients to e and q."""
  options = {'ids': ids, 'num_codes': K, 'mask': mask, 'axis_name': axis_name}
  value, vjp = jax.vjp(
    lambda e, q: ESTIMATORS[name](e, q, max_scale=10.0, **options), e, q
  )
  return value, *vjp(g)


@jax.jit
def gradients(*arguments):
  return {name: pull(name, *arguments) for name in ESTIMATORS}


@pytest.fixture(scope='module')
def results():
  return jax.device_get(gradients(E, Q, G, IDS, MASK))


def oracle(name):
  """Gradients to e and q in float64."""
  e, q, g = (np.float64(x) for x in (E, Q, G))
  to_e, to_q = g.copy(), np.zeros_like(g)
  distance = ((e - q) ** 2).sum(1)
  for i in range(N):
    if name == 'dynamic_ste':
      cell = (IDS == IDS[i]) & MASK
      least = min([distance[i], *distance[cell]])
      to_e[i] *= (least + 1e-12) / (distance[i] + 1e-12)
    elif name == 'diveq':
      d = (q[i] - e[i]) / np.sqrt(distance[i])
      to_q[i] = d * (d @ g[i])
      to_e[i] -= to_q[i]
    elif name == 'rotation_unscaled':
      to_e[i] = rotation_matrix(e[i], q[i]).T @ g[i]
    else:
      to_e[i] = expected_gradient(name, e[i], q[i], g[i])
  return to_e, to_q


@pytest.mark.parametrize('name', ESTIMATORS)
def test_gradients_are_those_of_the_formula(name, results):
  for got, want in zip(results[name][1:], oracle(name), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_every_estimator_returns_the_codes_bit_exact(dtype):
  results = gradients((1e3 * E).astype(dtype), Q, G, IDS, MASK)
  for name, (value, *_) in results.items():
    assert np.asarray(value).tobytes() == Q.tobytes(), name


def test_no_two_estimators_have_one_gradient(results):
  names = list(results)
  for i, a in enumerate(names):
    for b in names[:i]:
      assert np.abs(results[a][1] - results[b][1]).max() > 0.05, (a, b)


def test_a_vector_on_its_code_gets_the_whole_gradient():
  results = jax.device_get(gradients(Q, Q, G, IDS, MASK))
  for name in ('dynamic_ste', 'diveq'):
    np.testing.assert_array_equal(results[name][1], G)
  np.testing.assert_array_equal(results['diveq'][2], np.zeros_like(G))


def test_the_nearest_vector_of_a_cell_is_that_of_all_devices():
  parts = [x.reshape(4, -1, *x.shape[1:]) for x in (E, Q, G, IDS, MASK)]
  share = functools.partial(pull, 'dynamic_ste', axis_name='data')
  got = jax.vmap(share, axis_name='data')(*parts)[1]
  want = pull('dynamic_ste', E, Q, G, IDS, MASK)[1]
  np.testing.assert_allclose(got.reshape(N, D), want, rtol=1e-6)


def test_diveq_trains_the_codes_without_a_loss():
  weights = {'commitment_weight': 0.0, 'codebook_weight': 0.0}
  layer = VectorQuantizer(
    K, estimator='diveq', ema=False, init_from='normal', **weights
  )
  variables = init(layer, E)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradients_of(params):
    out = layer.apply(variables | {'params': params}, E)
    return jnp.sum(out.quantized * G) + out.loss, out

  gradient, out = gradients_of(variables['params'])
  codes = np.asarray(variables['params']['embedding'], np.float64)
  want = np.zeros((K, D))
  for e, g, k in zip(E, np.float64(G), np.asarray(out.ids), strict=True):
    d = (codes[k] - e) / np.linalg.norm(codes[k] - e)
    want[k] += d * (d @ g)
  np.testing.assert_allclose(gradient['embedding'], want, rtol=1e-4, atol=1e-5)
  assert out.loss == 0
