"""Gumbel-softmax, FSQ and SimVQ against NumPy, behind one interface."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rvq_jax.quantize.fsq import FSQ, fsq_levels
from rvq_jax.quantize.gumbel import GumbelQuantizer
from rvq_jax.quantize.simvq import SimVQ
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE

K = 16
Z = np.random.default_rng(0).normal(size=(8, 6, 5)).astype(np.float32)
G = np.random.default_rng(1).normal(size=Z.shape).astype(np.float32)
LAYERS = {
  'gumbel': GumbelQuantizer(
    K, temperature_start=2.0, temperature_end=1e-4, temperature_steps=8
  ),
  'gumbel projected': GumbelQuantizer(K, code_dim=3),
  'fsq': FSQ(K),
  'fsq of odd levels': FSQ(15, levels=(5, 3)),
  'simvq': SimVQ(K),
  'simvq projected': SimVQ(K, code_dim=3, estimator='rotation'),
}
EACH = pytest.mark.parametrize('name', ['gumbel', 'fsq', 'simvq'])
EVERY = pytest.mark.parametrize('name', LAYERS)


@functools.partial(
  jax.jit, static_argnames=('layer', 'train'), compiler_options=RUNS_ONCE
)
def _init(layer, z, train):
  return layer.init(jax.random.key(0), z, train=train)


@functools.cache
def init(layer):
  """Variables in which no parameter, biases included, is 0 throughout."""
  variables = jax.device_get(_init(layer, Z, True))
  rng = np.random.default_rng(2)
  moved = jax.tree.map(
    lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)),
    variables['params'],
  )
  return variables | {'params': moved}


@functools.partial(jax.jit, static_argnames='layer')
def _evaluate(layer, variables, z):
  return layer.apply(variables, z, mutable=['params', 'codebook'])


@functools.partial(jax.jit, static_argnames='layer')
def _train(layer, variables, z, mask, seed):
  out, updates = layer.apply(
    variables,
    z,
    train=True,
    mask=mask,
    mutable=['codebook'],
    rngs={'codebook': jax.random.key(seed)},
  )
  return out, variables | updates


# One signature each: a default argument left out would be another program.
def evaluate(layer, variables, z=Z):
  return _evaluate(layer, variables, z)[0]


def train(layer, variables, z=Z, mask=None, seed=0):
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _train(layer, variables, z, mask, seed)


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


def dense(x, parameters):
  kernel = np.float64(parameters['kernel'])
  return np.float64(x) @ kernel + np.float64(parameters.get('bias', 0.0))


@EVERY
def test_ids_give_back_what_evaluation_gave(name):
  layer = LAYERS[name]
  variables = init(layer)
  out = evaluate(layer, variables)
  got = decode(layer, variables, out.ids)
  assert got.dtype == out.quantized.dtype == jnp.float32
  np.testing.assert_array_equal(got, out.quantized)
  assert len(np.unique(out.ids)) > 4


@EACH
def test_counts_usage_and_perplexity_are_those_of_the_ids(name):
  layer = LAYERS[name]
  out, _ = train(layer, init(layer))
  counts = np.bincount(np.ravel(out.ids), minlength=layer.codebook_size)
  np.testing.assert_array_equal(out.counts, counts)
  p = counts[counts > 0] / counts.sum()
  np.testing.assert_allclose(out.metrics['usage'], np.mean(counts > 0))
  np.testing.assert_allclose(
    out.metrics['perplexity'], np.exp(-np.sum(p * np.log(p))), rtol=1e-5
  )


@EACH
def test_bfloat16_changes_the_dtype_of_quantized_alone(name):
  layer = LAYERS[name]
  z = jnp.asarray(Z, jnp.bfloat16)
  out = evaluate(layer, init(layer), z)
  exact = evaluate(layer, init(layer), z.astype(jnp.float32))
  assert out.quantized.dtype == jnp.bfloat16
  assert out.quantized.shape == Z.shape
  assert (out.ids.dtype, out.ids.shape) == (jnp.int32, Z.shape[:-1])
  np.testing.assert_array_equal(out.ids, exact.ids)
  for x in (out.loss, *out.metrics.values()):
    assert (x.dtype, x.shape) == (jnp.float32, ())
    assert np.isfinite(x)
  np.testing.assert_array_equal(
    out.quantized, exact.quantized.astype(jnp.bfloat16)
  )


@EACH
def test_evaluation_and_init_write_nothing(name):
  layer = LAYERS[name]
  variables = init(layer)
  _, kept = _evaluate(layer, variables, Z)
  jax.tree.map(np.testing.assert_array_equal, kept, variables)
  other = _init(layer, Z, False)
  jax.tree.map(np.testing.assert_array_equal, other, _init(layer, Z, True))


@EACH
def test_masked_positions_count_nowhere(name):
  layer = LAYERS[name]
  mask = np.arange(48).reshape(8, 6) % 3 > 0
  wild = np.where(mask[..., None], Z, 1e3).astype(np.float32)
  one, after_one = train(layer, init(layer), Z, mask)
  two, after_two = train(layer, init(layer), wild, mask)
  jax.tree.map(
    np.testing.assert_array_equal,
    (one.counts, one.loss, one.metrics, after_one),
    (two.counts, two.loss, two.metrics, after_two),
  )
  assert np.sum(one.counts) == mask.sum()
  np.testing.assert_array_equal(
    one.counts, np.bincount(np.asarray(one.ids)[mask], minlength=K)
  )


@EACH
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_row_that_is_not_finite_gets_an_id_but_no_count(name, bad):
  layer = LAYERS[name]
  z = Z.copy()
  z[3, 2, 1] = bad
  out = evaluate(layer, init(layer), z)
  whole = evaluate(layer, init(layer))
  others = np.arange(48) != 3 * 6 + 2
  ids = np.ravel(out.ids)
  np.testing.assert_array_equal(ids[others], np.ravel(whole.ids)[others])
  np.testing.assert_array_equal(
    out.counts, np.bincount(ids[others], minlength=K)
  )
  assert 0 <= ids.min() <= ids.max() < K
  assert np.isfinite(out.quantized).all()


@EACH
def test_eight_devices_do_as_one_and_count_together(name):
  layer = LAYERS[name]
  variables = init(layer)

  def step(variables, z):
    split = layer.clone(axis_name='data')
    out, after = train(split, variables, z)
    return out.quantized, out.ids, out.counts, after

  mesh = jax.sharding.Mesh(jax.devices('cpu'), ('data',))
  split = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=(P('data'), P('data'), P(), P()),
    )
  )(variables, Z)
  out, after = train(layer, variables)
  np.testing.assert_array_equal(split[1], out.ids)
  np.testing.assert_array_equal(split[2], out.counts)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    (split[0], split[3]),
    (out.quantized, after),
  )


def at_step(variables, step):
  return variables | {'codebook': {'step': np.int32(step)}}


def test_gumbel_temperature_follows_half_a_cosine():
  layer = LAYERS['gumbel']
  for step in (0, 1, 4, 7, 8, 100):
    variables = at_step(init(layer), step)
    _, after = train(layer, variables)
    got = evaluate(layer, variables).metrics['temperature']
    done = min(step / 8, 1)
    want = 1e-4 + (2 - 1e-4) * math.cos(math.pi / 2 * done) ** 2
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert after['codebook']['step'] == step + 1


def test_gumbel_mixture_hardens_as_the_temperature_falls():
  layer = LAYERS['gumbel']
  codes = init(layer)['params']['embedding']
  warm, _ = train(layer, init(layer))
  cold, _ = train(layer, at_step(init(layer), 8))
  np.testing.assert_array_equal(warm.ids, cold.ids)
  np.testing.assert_allclose(cold.quantized, codes[cold.ids], atol=1e-5)
  assert cold.metrics['quantization_error'] < 1e-6
  gap = np.mean((warm.quantized - codes[warm.ids]) ** 2)
  np.testing.assert_allclose(warm.metrics['quantization_error'], gap, rtol=1e-5)
  assert gap > 0.1


def test_gumbel_draws_codes_by_their_probability():
  layer = LAYERS['gumbel']
  variables = init(layer)
  logits = variables['params']['logits']['bias'] * 3
  p = np.exp(logits) / np.exp(logits).sum()
  variables = variables | {
    'params': variables['params']
    | {'logits': {'kernel': np.zeros((5, K), np.float32), 'bias': logits}}
  }
  n = 8000
  out, _ = train(layer, variables, np.zeros((n, 5), np.float32))
  spread = np.sqrt(n * p * (1 - p))
  assert np.all(np.abs(out.counts - n * p) < 4 * spread)
  other, _ = train(layer, variables, np.zeros((n, 5), np.float32), seed=1)
  assert np.mean(out.ids != other.ids) > 0.5


def test_gumbel_evaluation_takes_the_largest_logit():
  layer = LAYERS['gumbel']
  variables = init(layer)
  ids = np.argmax(dense(Z, variables['params']['logits']), axis=-1)
  out = evaluate(layer, variables)
  np.testing.assert_array_equal(out.ids, ids)
  np.testing.assert_array_equal(
    out.quantized, variables['params']['embedding'][ids]
  )


@pytest.mark.parametrize(('size', 'kl'), [(0.0, 0.0), (1e3, math.log(K))])
def test_gumbel_divergence_runs_from_zero_to_log_k(size, kl):
  layer = LAYERS['gumbel']
  variables = init(layer)
  logits = {
    'kernel': np.zeros((5, K), np.float32),
    'bias': np.float32(size) * (np.arange(K) == 5),
  }
  variables = variables | {'params': variables['params'] | {'logits': logits}}
  out = evaluate(layer, variables)
  np.testing.assert_allclose(out.metrics['kl'], kl, atol=1e-6)
  np.testing.assert_allclose(out.loss, 5e-4 * kl, rtol=1e-5, atol=1e-9)
  assert np.all(out.ids == (5 if size else 0))  # a tie goes to the lowest


def test_gumbel_gradient_reaches_the_encoder_and_every_code():
  layer = LAYERS['gumbel']
  variables = init(layer)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(z, params):
    out, _ = train(layer, variables | {'params': params}, z)
    return jnp.sum(out.quantized * G)

  to_z, to_params = gradient(jnp.asarray(Z), variables['params'])
  assert np.all(np.abs(to_z).max(-1) > 1e-4)
  assert np.all(np.abs(to_params['embedding']).max(-1) > 1e-3)
  # y sums to 1 over the codes: what all of them receive is the cotangent.
  np.testing.assert_allclose(
    to_params['embedding'].sum(0), G.reshape(-1, 5).sum(0), rtol=1e-4
  )


def test_gumbel_training_without_noise_is_refused():
  layer = LAYERS['gumbel']
  with pytest.raises(ValueError, match="expected the rng stream 'codebook'"):
    layer.apply(init(layer), Z, train=True, mutable=['codebook'])


@pytest.mark.parametrize('bits', range(1, 31))
def test_fsq_levels_multiply_to_every_power_of_two(bits):
  levels = fsq_levels(2**bits)
  assert math.prod(levels) == 2**bits
  assert list(levels) == sorted(levels, reverse=True)
  assert set(levels) <= ({8, 4} if bits > 1 else {2})
  assert levels.count(4) <= 2


def test_fsq_levels_take_eights_first():
  assert fsq_levels(2**14) == (8, 8, 8, 8, 4)
  assert fsq_levels(2**10) == (8, 8, 4, 4)
  assert fsq_levels(8) == (8,)


@pytest.mark.parametrize(('size', 'near'), [(1000, 1024), (20, 16), (1, 2)])
def test_fsq_levels_of_another_number_are_refused(size, near):
  with pytest.raises(ValueError, match=f'the nearest is {near}, or give'):
    fsq_levels(size)


def open_fsq(levels):
  """An `FSQ` whose projections are the identity, and its variables."""
  layer = FSQ(math.prod(levels), levels=levels)
  eye = {
    'kernel': np.eye(len(levels), dtype=np.float32),
    'bias': np.zeros(len(levels), np.float32),
  }
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
  out = evaluate(layer, variables, z)
  np.testing.assert_array_equal(out.ids, ids)
  half = np.asarray(levels) // 2
  np.testing.assert_allclose(out.quantized, np.round(bounded) / half)
  error = np.mean(((np.round(bounded) - bounded) / half) ** 2)
  np.testing.assert_allclose(
    out.metrics['quantization_error'], error, rtol=1e-4
  )
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
  np.testing.assert_allclose(
    gradient, G * slope / (np.asarray(levels) // 2), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize('name', ['simvq', 'simvq projected'])
def test_simvq_codes_are_the_nearest_of_the_mapped_ones(name):
  layer = LAYERS[name]
  variables = init(layer)
  params = variables['params']
  e = Z.reshape(-1, 5)
  if layer.code_dim:
    e = dense(e, params['project_in'])
  codes = dense(variables['codebook']['embedding'], params['map'])
  ids = ((e[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)
  out = evaluate(layer, variables)
  np.testing.assert_array_equal(np.ravel(out.ids), ids)
  error = np.mean((e - codes[ids]) ** 2)
  np.testing.assert_allclose(out.loss, 1.25 * error, rtol=1e-4)
  q = codes[ids]
  if layer.code_dim:
    q = dense(q, params['project_out'])
  np.testing.assert_allclose(out.quantized.reshape(-1, 5), q, atol=1e-5)


def test_simvq_starts_from_its_gaussian_codes():
  variables = jax.device_get(_init(SimVQ(2048), Z, False))
  np.testing.assert_array_equal(variables['params']['map']['kernel'], np.eye(5))
  codes = variables['codebook']['embedding']
  assert codes.shape == (2048, 5)
  np.testing.assert_allclose(codes.std(0), 5**-0.5, rtol=0.1)
  np.testing.assert_allclose(codes.mean(0), 0, atol=0.05)


def test_simvq_one_step_moves_every_code_by_the_map_alone():
  layer = LAYERS['simvq']
  variables = init(layer)
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


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    (GumbelQuantizer(0), 'codebook_size: expected at least 1'),
    (
      GumbelQuantizer(K, temperature_end=0.0),
      'temperature_end: expected at least',
    ),
    (GumbelQuantizer(K, temperature_start=None), 'start: expected a value'),
    (GumbelQuantizer(K, temperature_steps=2.5), 'steps: expected an integer'),
    (GumbelQuantizer(K, kl_weight=-1.0), 'kl_weight: expected at least 0'),
    (FSQ(1000), 'nearest is 1024, or give `levels`'),
    (FSQ(K, levels=(8, 4)), 'multiply to codebook_size 16, got'),
    (FSQ(K, levels=(16, 1)), 'integers of at least 2'),
    (SimVQ(K, estimator='soft'), 'estimator: expected one of'),
    (SimVQ(K, commitment_weight=-1), 'commitment_weight: expected at least'),
  ],
)
def test_impossible_arguments_are_refused(layer, message):
  with pytest.raises(ValueError, match=message) as error:
    layer.init(jax.random.key(0), Z)
  assert '\n' not in str(error.value)


@EACH
def test_a_mask_of_another_shape_is_refused(name):
  with pytest.raises(ValueError, match='expected a mask'):
    LAYERS[name].init(jax.random.key(0), Z, mask=np.ones(8, bool))
