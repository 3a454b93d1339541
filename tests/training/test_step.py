"""What a step changes, and what it leaves alone."""

import functools

import jax
import numpy as np
from tiny_model import tiny_vqvae

from rvq_jax.training.optimizer import make_optimizer
from rvq_jax.training.run import RUNS_ONCE
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step
from rvq_jax.training.validation import make_eval_step

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype('f')


@functools.cache
def build():
  model = tiny_vqvae()
  optimizer = make_optimizer(lambda _: 1e-2)
  state = jax.jit(
    lambda: create_state(
      model,
      optimizer,
      jax.random.key(0),
      image_size=8,
      batch_size=4,
      params_ema=True,
    ),
    compiler_options=RUNS_ONCE,
  )()
  step = make_train_step(model, optimizer, params_ema_decay=0.5)
  return model, jax.jit(step), state


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_a_step_moves_every_part_of_the_state():
  _, step, state = build()
  after, metrics = step(state, {'image': IMAGES})
  for name in ('params', 'batch_stats', 'codebook', 'opt_state', 'averages'):
    assert bits(getattr(after, name)) != bits(getattr(state, name)), name
  assert after.step == 1
  assert metrics['skipped'] == 0


def test_the_loss_is_reconstruction_plus_quantizer():
  _, step, state = build()
  state, _ = step(state, {'image': IMAGES})
  _, metrics = step(state, {'image': IMAGES})
  np.testing.assert_allclose(
    metrics['loss'], metrics['mse'] + metrics['commitment_loss'], rtol=1e-5
  )


def test_repeated_steps_lower_the_loss():
  _, step, state = build()
  losses = []
  for _ in range(60):
    state, metrics = step(state, {'image': IMAGES})
    losses.append(float(metrics['mse']))
  assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


def test_the_averages_of_parameters_and_statistics_follow_at_their_decay():
  _, step, state = build()
  after, _ = step(state, {'image': IMAGES})
  for name, averages in after.averages.items():
    for average, new, old in zip(
      *map(jax.tree.leaves, (averages, after.variables[name])),
      jax.tree.leaves(state.variables[name]),
      strict=True,
    ):
      np.testing.assert_allclose(average, 0.5 * old + 0.5 * new, atol=1e-6)
  assert after.eval_variables == after.variables | after.averages


def test_uint8_images_are_the_floats_they_stand_for():
  model, _, state = build()
  images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
  mask = np.ones(4, bool)
  evaluate = jax.jit(make_eval_step(model))
  got = evaluate(state.eval_variables, {'image': images, 'mask': mask})
  scaled = (images / 127.5 - 1).astype(np.float32)
  want = evaluate(state.eval_variables, {'image': scaled, 'mask': mask})
  np.testing.assert_allclose(got['mse'], want['mse'], rtol=1e-5)


def test_masked_images_stay_out_of_the_evaluation():
  model, _, state = build()
  evaluate = jax.jit(make_eval_step(model))
  spoilt = np.concatenate([IMAGES, 5 + IMAGES])
  mask = np.arange(8) < 4
  got = evaluate(state.variables, {'image': spoilt, 'mask': mask})
  want = evaluate(state.variables, {'image': IMAGES, 'mask': mask[:4]})
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
