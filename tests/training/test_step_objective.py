"""What a train step does with an objective: the model, the discriminator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_vqvae

from rvq_jax import sharding
from rvq_jax.models.discriminator import Discriminator
from rvq_jax.training.objective import Objective, lecam
from rvq_jax.training.run import RUNS_ONCE
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step

IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype('f')
RATE = 0.3
# D is updated from step 7 on, its loss counts from step 11 on.
OBJECTIVE = Objective(
  pixel='l1', adversarial_weight=2.0, lecam_weight=0.5, num_steps=30
)


def build(axis_name=None, **options):
  model = tiny_vqvae(
    vq={'name': 'fsq', 'codebook_size': 64},
    norm='group',
    axis_name=axis_name,
  )
  # Adam divides by the gradient's size, which magnifies rounding.
  optimizer = optax.sgd(RATE)
  options = {'objective': OBJECTIVE, 'adversarial': True} | options
  step = make_train_step(
    model, optimizer, flip=False, axis_name=axis_name, **options
  )
  return model, optimizer, step


@functools.cache
def jitted(**options):
  return jax.jit(build(**options)[2])


@functools.cache
def state_at(step):
  """A state with averages of LeCAM other than 0."""
  model, optimizer, _ = build()
  state = jax.jit(
    lambda: create_state(
      model,
      optimizer,
      jax.random.key(0),
      image_size=8,
      batch_size=8,
      discriminator=OBJECTIVE.init_discriminator(jax.random.key(1), 8),
    ),
    compiler_options=RUNS_ONCE,
  )()
  own = state.discriminator | {'logits_real': 0.7, 'logits_fake': -0.2}
  own = jax.tree.map(jnp.asarray, own)
  return state.replace(step=jnp.int32(step), discriminator=own)


def take(state, images=IMAGES, **options):
  return jax.device_get(jitted(**options)(state, {'image': images}))


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def softplus(x):
  return np.log1p(np.exp(np.float64(x)))


def other_judge(state, factor):
  """The state with D's parameters scaled."""
  params = jax.tree.map(lambda x: factor * x, state.discriminator['params'])
  return state.replace(discriminator=state.discriminator | {'params': params})


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


def test_lecam_is_that_of_numpy():
  real, fake = np.random.default_rng(2).normal(size=(2, 3, 4, 4)).astype('f')
  want = np.mean(np.maximum(real + 0.2, 0) ** 2)
  want += np.mean(np.maximum(0.7 - fake, 0) ** 2)
  np.testing.assert_allclose(lecam(real, fake, 0.7, -0.2), want, rtol=1e-5)


def test_the_losses_are_those_of_numpy():
  state = state_at(12)  # r = 2/3
  _, metrics = take(state)
  model, _, _ = build()
  y = jax.jit(model.apply)(state.variables, IMAGES).reconstruction
  judge = functools.partial(
    jax.jit(Discriminator().apply), {'params': state.discriminator['params']}
  )
  real, fake = judge(IMAGES), judge(y)
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


def test_each_player_follows_the_gradient_of_its_own_loss():
  """Those of losses written out here, which see the other's old parameters."""
  state, (model, _, _) = state_at(12), build()
  after, _ = take(state)
  old = state.discriminator

  @functools.partial(jax.jit, compiler_options=RUNS_ONCE)
  def gradients(params, judge):
    def reconstruct(params):
      variables = state.variables | {'params': params}
      return model.apply(variables, IMAGES).reconstruction

    def generator(params):
      y = reconstruct(params)
      fake = Discriminator().apply({'params': judge}, y)
      adversarial = jnp.mean(jnp.logaddexp(-fake, 0.0))
      return jnp.mean(jnp.abs(y - IMAGES)) + 2 / 3 * 2.0 * adversarial

    def discriminator(judge):
      y = reconstruct(params)
      real, fake = (
        Discriminator().apply({'params': judge}, x) for x in (IMAGES, y)
      )
      loss = jnp.logaddexp(-real, 0.0) + jnp.logaddexp(fake, 0.0)
      penalty = jnp.maximum(real + 0.2, 0) ** 2
      penalty += jnp.maximum(0.7 - fake, 0) ** 2
      return jnp.mean(loss) / 2 + 0.5 * jnp.mean(penalty)

    return jax.grad(generator)(params), jax.grad(discriminator)(judge)

  want, want_judge = gradients(state.params, old['params'])
  got = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, after.params)
  moment = optax.tree.get(after.discriminator['opt_state'], 'mu')
  got_judge = jax.tree.map(lambda x: 10 * x, moment)
  for a, b in ((got, want), (got_judge, want_judge)):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
      atol = 1e-3 * float(np.abs(y).max()) + 1e-6
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=atol)
  for name in ('logits_real', 'logits_fake'):
    assert bits(after.discriminator[name]) != bits(old[name])


def test_lecams_averages_follow_the_logits():
  after, metrics = take(state_at(12))
  for name, old in (('logits_real', 0.7), ('logits_fake', -0.2)):
    want = 0.999 * old + 0.001 * metrics[name]
    np.testing.assert_allclose(after.discriminator[name], want, rtol=1e-5)


def test_the_discriminator_counts_only_once_the_ramp_rises():
  for step, counts in ((7, False), (10, False), (11, True)):
    state = state_at(step)
    (a, _), (b, _) = (take(other_judge(state, f)) for f in (1.0, 0.5))
    assert (bits(a.params) != bits(b.params)) == counts, step
    assert bits(a.discriminator) != bits(state.discriminator)


def test_before_its_phase_the_discriminator_is_left_alone():
  state = state_at(12)
  after, metrics = take(state, adversarial=False)
  assert bits(after.discriminator) == bits(state.discriminator)
  assert bits(after.params) != bits(state.params)
  assert set(metrics) & {'discriminator_loss', 'adversarial_loss'} == set()


def as_before(state):
  """The state but for what counts every step."""
  return state.replace(step=0, nonfinite_streak=0)


@pytest.mark.parametrize('part', ['params', 'opt_state', 'logits_real'])
@pytest.mark.parametrize('step', [7, 12])
def test_nan_in_the_discriminator_leaves_both_as_they_were(part, step):
  state = state_at(step)
  spoilt = jax.tree.map(
    lambda x: x * jnp.nan if x.dtype == jnp.float32 else x,
    state.discriminator[part],
  )
  state = state.replace(discriminator=state.discriminator | {part: spoilt})
  after, metrics = take(state)
  assert metrics['skipped'] == 1 and after.nonfinite_streak == 1
  assert bits(as_before(after)) == bits(as_before(state))


def test_nan_in_an_image_leaves_both_as_they_were():
  images = IMAGES.copy()
  images[3, 2, 1, 0] = np.nan
  after, _ = take(state_at(12), images)
  assert bits(as_before(after)) == bits(as_before(state_at(12)))


def assert_same_step(got, want):
  """D's gradient, which its moment shows, LeCAM's averages, G, metrics."""

  def compared(result):
    state, metrics = result
    own = state.discriminator
    rest = {name: own[name] for name in ('logits_real', 'logits_fake')}
    moment = optax.tree.get(own['opt_state'], 'mu')
    return state.params, moment, rest, metrics

  got, want = compared(got), compared(want)
  paths = jax.tree_util.tree_leaves_with_path(got)
  for (path, x), y in zip(paths, jax.tree.leaves(want), strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_microbatches_give_the_update_of_the_whole_batch():
  # Nothing in this model depends on how a batch is divided.
  assert_same_step(take(state_at(12), accumulate_steps=4), take(state_at(12)))


@pytest.mark.parametrize(
  ('axis_name', 'steps'),
  [
    (None, 1),
    pytest.param('data', 1, marks=pytest.mark.slow),
    pytest.param('data', 2, marks=pytest.mark.slow),
  ],
)
def test_devices_take_the_step_of_one(axis_name, steps):
  mesh = sharding.data_mesh(jax.devices('cpu')[: 8 // steps])
  everywhere = sharding.replicated(mesh)
  _, _, step = build(axis_name=axis_name, accumulate_steps=steps)
  if axis_name:
    step = jax.shard_map(
      step, mesh=mesh, in_specs=(P(), P('data')), out_specs=(P(), P())
    )
  step = jax.jit(
    step,
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  got = jax.device_get(step(state_at(12), {'image': IMAGES}))
  assert_same_step(got, take(state_at(12)))
