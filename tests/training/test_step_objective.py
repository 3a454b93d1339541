"""What a train step does with an objective: the model, the discriminator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_step import (
  ADVERSARIAL,
  IMAGES,
  RATE,
  adversarial_state,
  bits,
  kept,
  take,
  tiny_step,
)

from rvq_jax.models.discriminator import Discriminator
from rvq_jax.training.objective import Objective
from rvq_jax.training.state import FAST_COMPILE

STEP = tiny_step(flip=False, **ADVERSARIAL)
advance = functools.partial(take, STEP)
state_at = functools.partial(adversarial_state, STEP)


def softplus(x):
  return np.log1p(np.exp(np.float64(x)))


@pytest.mark.parametrize(
  ('num_steps', 'start', 'ramp', 'values'),
  [
    (600, 200, 60, {0: 0, 140: 0, 200: 0, 230: 0.5, 260: 1, 599: 1}),
    (300_000, 100_000, 2000, {100_000: 0, 100_500: 0.25, 102_000: 1}),
    (1, 0, 1, {0: 0, 1: 1}),
  ],
)
def test_the_schedule_is_that_of_hand_numbers(num_steps, start, ramp, values):
  objective = Objective(num_steps=num_steps)
  assert (objective.start, objective.ramp) == (start, ramp)
  assert objective.discriminator_start == max(start - ramp, 0)
  got = {t: float(objective.adversarial_ramp(jnp.int32(t))) for t in values}
  assert got == values


@pytest.mark.slow
def test_a_run_that_is_made_longer_keeps_its_ramp():
  longer = dataclasses.replace(STEP.objective, num_steps=300)
  after, _ = advance(state_at(12))
  assert longer.resumed(after.discriminator) == STEP.objective
  assert longer.resumed(None) == longer  # without a discriminator


@pytest.mark.slow
def test_the_losses_and_lecams_averages_are_those_of_numpy():
  state = state_at(12)  # r = 2/3
  after, metrics = advance(state)
  y = jax.jit(STEP.model.apply)(state.variables, IMAGES).reconstruction
  params = {'params': state.discriminator['params']}
  real, fake = (jax.jit(Discriminator().apply)(params, x) for x in (IMAGES, y))
  penalty = np.mean(np.maximum(real + 0.2, 0) ** 2)
  penalty += np.mean(np.maximum(0.7 - fake, 0) ** 2)
  l1, adversarial = np.mean(np.abs(y - IMAGES)), np.mean(softplus(-fake))
  want = {
    'l1': l1,
    'mse': np.mean((y - IMAGES) ** 2),
    'adversarial_ramp': 2 / 3,
    'adversarial_loss': adversarial,
    'loss': l1 + 2 / 3 * 2.0 * adversarial,  # fsq has no loss
    'discriminator_loss': np.mean(softplus(-real) + softplus(fake)) / 2,
    'lecam': penalty,
    'logits_real': np.mean(real),
    'logits_fake': np.mean(fake),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  for name, old in (('logits_real', 0.7), ('logits_fake', -0.2)):
    average = 0.999 * old + 0.001 * metrics[name]
    np.testing.assert_allclose(after.discriminator[name], average, rtol=1e-5)


def test_each_player_follows_the_gradient_of_its_own_loss():
  """Gradients of losses written here, which see the other's old parameters."""
  state = state_at(12)
  after, _ = advance(state)
  old = state.discriminator

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def gradients(params, other):
    def reconstruct(params):
      variables = state.variables | {'params': params}
      return STEP.model.apply(variables, IMAGES).reconstruction

    def generator(params):
      y = reconstruct(params)
      fake = Discriminator().apply({'params': other}, y)
      adversarial = jnp.mean(jnp.logaddexp(-fake, 0.0))
      return jnp.mean(jnp.abs(y - IMAGES)) + 2 / 3 * 2.0 * adversarial

    def discriminator(other):
      y = reconstruct(params)
      real, fake = (
        Discriminator().apply({'params': other}, x) for x in (IMAGES, y)
      )
      loss = jnp.logaddexp(-real, 0.0) + jnp.logaddexp(fake, 0.0)
      penalty = jnp.maximum(real + 0.2, 0) ** 2
      penalty += jnp.maximum(0.7 - fake, 0) ** 2
      return jnp.mean(loss) / 2 + 0.5 * jnp.mean(penalty)

    return jax.grad(generator)(params), jax.grad(discriminator)(other)

  want, want_other = gradients(state.params, old['params'])
  got = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, after.params)
  moment = optax.tree.get(after.discriminator['opt_state'], 'mu')
  got_other = jax.tree.map(lambda x: 10 * x, moment)
  for a, b in ((got, want), (got_other, want_other)):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
      atol = 1e-3 * float(np.abs(y).max()) + 1e-6
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=atol)
  for name in ('logits_real', 'logits_fake'):
    assert bits(after.discriminator[name]) != bits(old[name])


def test_the_discriminator_counts_only_once_the_ramp_rises():
  for step, counts in ((7, False), (10, False), (11, True)):
    state = state_at(step)
    halved = jax.tree.map(lambda x: x / 2, state.discriminator['params'])
    other = state.discriminator | {'params': halved}
    after, _ = advance(state)
    judged, _ = advance(state.replace(discriminator=other))
    assert (bits(after.params) != bits(judged.params)) == counts, step
    assert bits(after.discriminator) != bits(state.discriminator)


def test_before_its_phase_the_discriminator_is_left_alone():
  state = state_at(12)
  before = dataclasses.replace(STEP, adversarial=False)
  after, metrics = take(before, state, IMAGES)
  assert bits(after.discriminator) == bits(state.discriminator)
  assert bits(after.params) != bits(state.params)
  assert set(metrics) & {'discriminator_loss', 'adversarial_loss'} == set()


@pytest.mark.parametrize(
  'part', ['params', 'opt_state', 'logits_real', 'image']
)
@pytest.mark.parametrize('step', [7, 12])
def test_nan_in_the_discriminator_or_an_image_changes_nothing(part, step):
  state, images = state_at(step), IMAGES.copy()
  if part == 'image':
    images[3, 2, 1, 0] = np.nan
  else:
    spoilt = jax.tree.map(
      lambda x: x * jnp.nan if x.dtype == jnp.float32 else x,
      state.discriminator[part],
    )
    state = state.replace(discriminator=state.discriminator | {part: spoilt})
  after, metrics = take(STEP, state, images)
  assert metrics['skipped'] == 1 and after.nonfinite_streak == 1
  assert kept(after) == kept(state)
