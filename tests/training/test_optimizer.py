"""The schedule's values and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


def test_cosine_starts_at_the_rate_and_ends_at_zero():
  schedule = make_schedule(2e-4, num_steps=100)
  got = [float(schedule(step)) for step in (0, 25, 50, 100)]
  want = 2e-4 * 0.5 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 1])))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)


def test_warmup_rises_in_a_line_and_cosine_follows():
  schedule = make_schedule(1.0, num_steps=110, warmup_steps=10)
  got = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
  np.testing.assert_allclose(got, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_unknown_schedule_and_long_warmup_are_refused():
  with pytest.raises(ValueError, match='cosine, constant'):
    make_schedule(1.0, num_steps=10, schedule='linear')
  with pytest.raises(ValueError, match='less than the 10 steps'):
    make_schedule(1.0, num_steps=10, warmup_steps=10)


PARAMS = {
  'conv': {'kernel': jnp.ones(3), 'bias': jnp.ones(3)},
  'bn': {'scale': jnp.ones(3)},
  'vq': {'embedding': jnp.ones(3)},
}


def test_only_kernels_decay():
  mask = decay_mask(PARAMS)
  assert mask == {
    'conv': {'kernel': True, 'bias': False},
    'bn': {'scale': False},
    'vq': {'embedding': False},
  }
  optimizer = make_optimizer(lambda _: 0.1, weight_decay=0.5)
  zero = {k: {n: 0 * x for n, x in v.items()} for k, v in PARAMS.items()}
  updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['conv']['kernel'], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['vq']['embedding'], 0)


def test_frozen_codes_ignore_the_momentum_and_keep_the_state():
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  free, frozen = (
    make_optimizer(lambda _: 0.1, freeze_codes=freeze)
    for freeze in (False, True)
  )
  _, state = free.update(PARAMS, free.init(PARAMS), PARAMS)
  want, want_state = free.update(zero, state, PARAMS)
  updates, after = frozen.update(zero, state, PARAMS)
  assert jnp.all(want['vq']['embedding'] < -0.01)  # momentum
  want['vq']['embedding'] = jnp.zeros(3)
  for got, expected in ((updates, want), (after, want_state)):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_what_frozen_multi_scale_ids_decode_to_does_not_decay():
  phi = {'kernel': jnp.ones(3), 'bias': jnp.ones(3)}
  params = {'vq': {'phi_0': phi, 'project_out': {'kernel': jnp.ones(3)}}}
  optimizer = make_optimizer(lambda _: 0.1, freeze_codes=True)
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  assert not any(jnp.any(x) for x in updates['vq']['phi_0'].values())
  assert jnp.all(updates['vq']['project_out']['kernel'] < -0.01)


def test_clipping_bounds_the_gradient():
  optimizer = make_optimizer(lambda _: 1.0, weight_decay=0.0, clip_norm=1e-3)
  state = optimizer.init(PARAMS)
  grads = {k: {n: 1e6 * x for n, x in v.items()} for k, v in PARAMS.items()}
  _, state = optimizer.update(grads, state, PARAMS)
  mu = state[1][0].mu['conv']['kernel']
  np.testing.assert_allclose(mu, 0.1 * 1e-3 / np.sqrt(12), rtol=1e-4)


def test_the_quantizers_parameters_have_a_rate_of_their_own():
  params = {'vq': {'embedding': jnp.ones(3)}, 'decoder': {'bias': jnp.ones(3)}}
  grads = jax.tree.map(lambda p: 0.5 * p, params)
  optimizer = make_optimizer(lambda _: 1e-2, quantizer_scale=4.0)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates['decoder']['bias'], -1e-2, rtol=1e-4)
  np.testing.assert_allclose(updates['vq']['embedding'], -4e-2, rtol=1e-4)
