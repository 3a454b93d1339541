"""Gumbel-softmax, FSQ and SimVQ against NumPy, behind one interface."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_programs import decode, evaluate, init, moved, nearest, random, train

from rvq_jax.quantize.fsq import FSQ, fsq_levels
from rvq_jax.quantize.gumbel import GumbelQuantizer
from rvq_jax.quantize.simvq import SimVQ

K = 16
Z, G = random(0, 8, 6, 5), random(1, 8, 6, 5)
GUMBEL = GumbelQuantizer(
  K, temperature_start=2.0, temperature_end=1e-4, temperature_steps=8
)


@functools.cache
def start(layer):
  variables = jax.device_get(init(layer, Z))
  return variables | {'params': moved(variables['params'], 0.3)}


def dense(x, parameters):
  kernel = np.float64(parameters['kernel'])
  return np.float64(x) @ kernel + np.float64(parameters.get('bias', 0.0))


def at_step(variables, step):
  return variables | {'codebook': {'step': np.int32(step)}}


def with_bias(variables, bias):
  """The same logits, `bias` [K], at every position."""
  logits = {'kernel': np.zeros((5, K), np.float32), 'bias': bias}
  return variables | {'params': variables['params'] | {'logits': logits}}


def test_gumbel_temperature_follows_half_a_cosine():
  ends = GumbelQuantizer.temperature_start, GumbelQuantizer.temperature_end
  assert ends == (1, 1 / 16)  # of DALL-E
  for step in (0, 1, 4, 7, 8, 100):
    variables = at_step(start(GUMBEL), step)
    out, after = train(GUMBEL, variables, Z)
    done = min(step / 8, 1)
    want = 1e-4 + (2 - 1e-4) * math.cos(math.pi / 2 * done) ** 2
    np.testing.assert_allclose(out.metrics['temperature'], want, rtol=1e-5)
    assert after['codebook']['step'] == step + 1


def test_gumbel_temperature_falls_from_1_to_a_sixteenth():
  """In 10,000 steps, unless told otherwise: as in DALL-E."""
  layer = GumbelQuantizer(K)
  for step, want in ((0, 1.0), (10_000, 1 / 16), (20_000, 1 / 16)):
    out, _ = train(layer, at_step(start(GUMBEL), step), Z)
    np.testing.assert_allclose(out.metrics['temperature'], want, rtol=1e-6)


def test_gumbel_mixture_hardens_as_the_temperature_falls():
  codes = start(GUMBEL)['params']['embedding']
  warm, _ = train(GUMBEL, start(GUMBEL), Z)
  cold, _ = train(GUMBEL, at_step(start(GUMBEL), 8), Z)
  np.testing.assert_array_equal(warm.ids, cold.ids)
  np.testing.assert_allclose(cold.quantized, codes[cold.ids], atol=1e-5)
  assert cold.metrics['quantization_error'] < 1e-6
  gap = np.mean((warm.quantized - codes[warm.ids]) ** 2)
  np.testing.assert_allclose(warm.metrics['quantization_error'], gap, rtol=1e-5)
  assert gap > 0.1


def test_gumbel_draws_codes_by_their_probability():
  variables = start(GUMBEL)
  bias, n = variables['params']['logits']['bias'] * 3, 8000
  p = np.exp(bias) / np.exp(bias).sum()
  variables = with_bias(variables, bias)
  out, _ = train(GUMBEL, variables, np.zeros((n, 5), np.float32))
  spread = np.sqrt(n * p * (1 - p))
  assert np.all(np.abs(out.counts - n * p) < 4 * spread)
  other, _ = train(GUMBEL, variables, np.zeros((n, 5), np.float32), seed=1)
  assert np.mean(out.ids != other.ids) > 0.5


def test_gumbel_evaluation_takes_the_largest_logit():
  variables = start(GUMBEL)
  ids = np.argmax(dense(Z, variables['params']['logits']), axis=-1)
  out, _ = evaluate(GUMBEL, variables, Z)
  np.testing.assert_array_equal(out.ids, ids)
  codes = variables['params']['embedding']
  np.testing.assert_array_equal(out.quantized, codes[ids])


@pytest.mark.parametrize(('size', 'kl'), [(0.0, 0.0), (1e3, math.log(K))])
def test_gumbel_divergence_runs_from_zero_to_log_k(size, kl):
  variables = start(GUMBEL)
  variables = with_bias(variables, np.float32(size) * (np.arange(K) == 5))
  out, _ = evaluate(GUMBEL, variables, Z)
  np.testing.assert_allclose(out.metrics['kl'], kl, atol=1e-6)
  np.testing.assert_allclose(out.loss, 5e-4 * kl, rtol=1e-5, atol=1e-9)
  assert np.all(out.ids == (5 if size else 0))  # a tie goes to the lowest


def test_gumbel_gradient_reaches_the_encoder_and_every_code():
  variables = start(GUMBEL)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(z, params):
    out, _ = train(GUMBEL, variables | {'params': params}, z)
    return jnp.sum(out.quantized * G)

  to_z, to_params = gradient(jnp.asarray(Z), variables['params'])
  assert np.all(np.abs(to_z).max(-1) > 1e-4)
  assert np.all(np.abs(to_params['embedding']).max(-1) > 1e-3)
  # y sums to 1 over the codes: what all of them receive is the cotangent.
  total, want = to_params['embedding'].sum(0), G.reshape(-1, 5).sum(0)
  np.testing.assert_allclose(total, want, rtol=1e-4)


def test_gumbel_training_without_noise_is_refused():
  with pytest.raises(ValueError, match="expected the rng stream 'codebook'"):
    GUMBEL.apply(start(GUMBEL), Z, train=True, mutable=['codebook'])


@pytest.mark.parametrize('bits', range(1, 31))
def test_fsq_levels_multiply_to_a_power_of_two_and_take_eights_first(bits):
  levels = fsq_levels(2**bits)
  assert math.prod(levels) == 2**bits
  assert list(levels) == sorted(levels, reverse=True)
  assert set(levels) <= ({8, 4} if bits > 1 else {2})
  assert levels.count(4) <= 2


def open_fsq(levels):
  """An `FSQ` whose projections are the identity, and its variables."""
  layer = FSQ(math.prod(levels), levels=levels)
  eye = {'kernel': np.float32(np.eye(len(levels)))}
  eye['bias'] = 0 * eye['kernel'][0]
  return layer, {'params': {'project_in': eye, 'project_out': eye}}


def numpy_bound(x, levels):
  """The paper's listing, in float64."""
  levels = np.asarray(levels)
  half = (levels - 1) * (1 - 1e-3) / 2
  offset = np.where(levels % 2 == 1, 0.0, 0.5)
  shift = np.tan(offset / half)
  return np.tanh(x + shift) * half - offset, half, shift


def test_fsq_projects_as_many_channels_as_levels_too():
  z = np.ones((3, 2), np.float32)
  variables = jax.eval_shape(FSQ(16, levels=(4, 4)).init, jax.random.key(0), z)
  assert set(variables['params']) == {'project_in', 'project_out'}


LEVELS = pytest.mark.parametrize('levels', [(8, 4), (5, 3), (2,)])


@LEVELS
def test_fsq_rounds_what_the_paper_bounds(levels):
  layer, variables = open_fsq(levels)
  rng = np.random.default_rng(3)
  z = 3 * rng.normal(size=(4000, len(levels))).astype(np.float32)
  bounded, _, _ = numpy_bound(np.float64(z), levels)
  near = np.abs(np.abs(bounded - np.floor(bounded)) - 0.5).min(-1)
  z, bounded = z[near > 1e-5], bounded[near > 1e-5]
  digits = np.round(bounded).astype(int) + np.asarray(levels) // 2
  ids = np.ravel_multi_index(digits.T, levels, order='F')
  assert set(ids) == set(range(math.prod(levels)))  # every id occurs
  out, _ = evaluate(layer, variables, z)
  np.testing.assert_array_equal(out.ids, ids)
  half = np.asarray(levels) // 2
  np.testing.assert_allclose(out.quantized, np.round(bounded) / half)
  error = np.mean(((np.round(bounded) - bounded) / half) ** 2)
  got = out.metrics['quantization_error']
  np.testing.assert_allclose(got, error, rtol=1e-4)
  assert out.loss == 0


@LEVELS
def test_fsq_ids_stand_for_the_points_of_a_grid(levels):
  layer, variables = open_fsq(levels)
  axes = [(np.arange(n) - n // 2) / (n // 2) for n in levels]
  grid = [p[::-1] for p in itertools.product(*axes[::-1])]
  got = decode(layer, variables, np.arange(math.prod(levels)))
  np.testing.assert_allclose(got, np.asarray(grid), rtol=1e-6)


def test_fsq_gradient_passes_the_rounding():
  levels = (8, 4, 5, 3, 2)
  layer, variables = open_fsq(levels)
  gradient = jax.jit(
    jax.grad(lambda z: jnp.sum(layer.apply(variables, z).quantized * G))
  )(jnp.asarray(Z))
  _, half, shift = numpy_bound(Z, levels)
  slope = half * (1 - np.tanh(np.float64(Z) + shift) ** 2)
  want = G * slope / (np.asarray(levels) // 2)
  np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('code_dim', [None, 3])
def test_simvq_codes_are_the_nearest_of_the_mapped_ones(code_dim):
  layer = SimVQ(K, code_dim=code_dim, estimator='rotation')
  variables = start(layer)
  params = variables['params']
  e = Z.reshape(-1, 5)
  if code_dim:
    e = dense(e, params['project_in'])
  codes = dense(variables['codebook']['embedding'], params['map'])
  ids = nearest(e, codes)
  out, _ = evaluate(layer, variables, Z)
  np.testing.assert_array_equal(np.ravel(out.ids), ids)
  q = codes[ids]
  np.testing.assert_allclose(out.loss, 1.25 * np.mean((e - q) ** 2), rtol=1e-4)
  if code_dim:
    q = dense(q, params['project_out'])
  np.testing.assert_allclose(out.quantized.reshape(-1, 5), q, atol=1e-5)


def test_simvq_starts_from_its_gaussian_codes():
  variables = jax.device_get(init(SimVQ(2048), Z))
  np.testing.assert_array_equal(variables['params']['map']['kernel'], np.eye(5))
  codes = variables['codebook']['embedding']
  assert codes.shape == (2048, 5)
  np.testing.assert_allclose(codes.std(0), 5**-0.5, rtol=0.1)
  np.testing.assert_allclose(codes.mean(0), 0, atol=0.05)


def test_simvq_one_step_moves_every_code_by_the_map_alone():
  layer = SimVQ(K)
  variables = start(layer)
  z = np.broadcast_to(Z[:1, :1], Z.shape)  # one code is chosen

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    out, after = train(layer, variables | {'params': params}, z)
    # The decoder's gradient does not reach the codes.
    return out.loss + jnp.sum(out.quantized * G), (out.ids, after)

  grads, (ids, after) = gradient(variables['params'])
  frozen = variables['codebook']['embedding']
  np.testing.assert_array_equal(after['codebook']['embedding'], frozen)
  kernel = variables['params']['map']['kernel']
  chosen = np.float64(frozen)[np.ravel(ids)]
  assert len(np.unique(ids)) == 1
  want = 2 / z.size * chosen.T @ (chosen @ kernel - z.reshape(-1, 5))
  got = grads['map']['kernel']
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
  moved = np.abs(frozen @ (kernel - 0.1 * got) - frozen @ kernel).max(-1)
  assert np.all(moved > 1e-4)
