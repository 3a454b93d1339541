"""The estimators by name against float64, and against their neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_programs import init

from rvq_jax import VectorQuantizer
from rvq_jax.quantize.gradients import ESTIMATORS

N, D, K = 24, 5, 6
_rng = np.random.default_rng(0)
E, G = _rng.normal(size=(2, N, D)).astype(np.float32)
CODES = _rng.normal(size=(K, D)).astype(np.float32)
IDS = (np.arange(N) % 5).astype(np.int32)  # nothing chooses the last code
Q = CODES[IDS]
MASK = np.arange(N) % 7 > 0


@jax.jit
def gradients(e, q, g, ids, mask):
  """Name -> the value and the gradients to e and q."""
  results = {}
  for name, estimator in ESTIMATORS.items():

    def apply(e, q, estimator=estimator):
      options = {'ids': ids, 'num_codes': K, 'mask': mask, 'axis_name': None}
      return estimator(e, q, max_scale=10.0, **options)

    value, vjp = jax.vjp(apply, e, q)
    results[name] = (value, *vjp(g))
  return results


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
      u, v = e[i] / np.linalg.norm(e[i]), q[i] / np.linalg.norm(q[i])
      w = (u + v) / np.linalg.norm(u + v)
      turn = np.eye(D) - 2 * np.outer(w, w) + 2 * np.outer(v, u)
      to_e[i] = turn.T @ g[i]
  return to_e, to_q


@pytest.mark.parametrize('name', ['dynamic_ste', 'diveq', 'rotation_unscaled'])
def test_gradients_are_those_of_the_formula(name, results):
  for got, want in zip(results[name][1:], oracle(name), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_estimator_returns_the_codes_bit_exact(results):
  for name, (value, *_) in results.items():
    assert value.tobytes() == Q.tobytes(), name


def test_no_two_estimators_have_one_gradient(results):
  names = list(results)
  for i, a in enumerate(names):
    for b in names[:i]:
      assert np.abs(results[a][1] - results[b][1]).max() > 0.05, (a, b)


def test_a_vector_on_its_code_gets_the_whole_gradient():
  e = Q.copy()
  results = jax.device_get(gradients(e, Q, G, IDS, MASK))
  for name in ('dynamic_ste', 'diveq'):
    np.testing.assert_array_equal(results[name][1], G)
  np.testing.assert_array_equal(results['diveq'][2], np.zeros_like(G))


def test_the_nearest_vector_of_a_cell_is_that_of_all_devices():
  def pull(axis_name, e, q, g, ids, mask):
    options = {'num_codes': K, 'max_scale': 10.0, 'axis_name': axis_name}
    _, vjp = jax.vjp(
      lambda e: ESTIMATORS['dynamic_ste'](e, q, ids=ids, mask=mask, **options),
      e,
    )
    return vjp(g)[0]

  parts = [x.reshape(4, -1, *x.shape[1:]) for x in (E, Q, G, IDS, MASK)]
  shares = jax.vmap(lambda *part: pull('data', *part), axis_name='data')(*parts)
  want = pull(None, E, Q, G, IDS, MASK)
  np.testing.assert_allclose(shares.reshape(N, D), want, rtol=1e-6)


def test_diveq_trains_the_codes_without_a_loss():
  layer = VectorQuantizer(
    K,
    ema=False,
    estimator='diveq',
    commitment_weight=0.0,
    codebook_weight=0.0,
    init_from='normal',
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
