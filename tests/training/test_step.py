"""What a step changes, and what it leaves alone."""

import jax
import numpy as np
from tiny_step import IMAGES, assert_close, bits, first_state, take, tiny_step

from rvq_jax.training.optimizer import make_optimizer
from rvq_jax.training.validation import make_eval_step

STEP = tiny_step(optimizer=make_optimizer(lambda _: 1e-2), params_ema_decay=0.5)
EVALUATE = jax.jit(make_eval_step(STEP.model))


def test_a_step_moves_every_part_of_the_state():
  state = first_state(STEP)
  after, metrics = take(STEP, state)
  assert (after.step, metrics['skipped']) == (1, 0)
  for name in ('params', 'batch_stats', 'codebook', 'opt_state', 'averages'):
    assert bits(getattr(after, name)) != bits(getattr(state, name)), name


def test_repeated_steps_lower_the_loss():
  state, losses = first_state(STEP), []
  for _ in range(60):
    state, metrics = take(STEP, state, IMAGES[:4])
    losses.append(float(metrics['mse']))
  assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


def test_the_averages_follow_at_a_decay_that_grows_to_theirs():
  state = first_state(STEP)
  after, _ = take(STEP, state)
  for name, averages in after.averages.items():
    for average, new, old in zip(
      *map(jax.tree.leaves, (averages, after.variables[name])),
      jax.tree.leaves(state.variables[name]),
      strict=True,
    ):
      np.testing.assert_allclose(average, 0.1 * old + 0.9 * new, atol=1e-6)
  assert after.eval_variables == after.variables | after.averages
  new = {'x': np.float32(1)}
  for step, decay in ((3, 4 / 13), (7, 8 / 17), (8, 0.5), (9999, 0.5)):
    state = state.replace(step=np.int32(step), averages={'x': np.float32(0)})
    average = state.next_averages(new, 0.5)['x']
    np.testing.assert_allclose(average, 1 - decay, rtol=1e-6)


def evaluate(images, mask):
  variables = first_state(STEP).eval_variables
  return EVALUATE(variables, {'image': images, 'mask': mask})


def test_masked_images_stay_out_of_the_evaluation():
  spoilt = np.concatenate([IMAGES[:4], 5 + IMAGES[:4]])
  got = evaluate(spoilt, np.arange(8) < 4)
  want = evaluate(IMAGES[:4], np.ones(4, bool))
  assert_close(got, want, rtol=1e-4, atol=1e-5)
