"""A run that diverges stops, says where and why, and keeps what was good."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny_vqvae

from rvq_jax import VQVAE
from rvq_jax.training import loop
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.optimizer import make_optimizer
from rvq_jax.training.state import create_state
from rvq_jax.training.step import MAX_NONFINITE_STREAK, make_train_step

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype('f')


class Spoilt(VQVAE):
  """A model whose gradient, not its loss, is infinite where asked for."""

  def apply(self, variables, images, **options):
    out, updates = super().apply(variables, images, **options)
    # The mark of a spoilt batch: a value that changes nothing else.
    factor = jnp.where(images[0, 0, 0, 0] == 0.5, jnp.inf, 1.0)
    made = _scale_gradient(out.reconstruction, factor)
    return out.replace(reconstruction=made), updates


@jax.custom_vjp
def _scale_gradient(x, factor):
  del factor
  return x


_scale_gradient.defvjp(
  lambda x, factor: (x, factor), lambda factor, g: (g * factor, None)
)


@functools.cache
def build():
  tiny = tiny_vqvae()
  model = Spoilt(tiny.encoder, tiny.vq, tiny.decoder)
  optimizer = make_optimizer(lambda _: 1e-2)
  state = jax.jit(
    lambda: create_state(
      model,
      optimizer,
      jax.random.key(0),
      image_size=8,
      batch_size=4,
      params_ema=True,
    )
  )()
  step = make_train_step(model, optimizer, params_ema_decay=0.5, flip=False)
  return jax.jit(step), state


def bits(state):
  state = state.replace(step=0, nonfinite_streak=0)
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def batch(spoilt):
  images = IMAGES.copy()
  if spoilt == 'gradient':
    images[0, 0, 0, 0] = 0.5
  elif spoilt:
    images[1, 2, 3, 0] = spoilt
  return {'image': images}


@pytest.mark.parametrize(
  'spoilt',
  [np.nan, pytest.param(np.inf, marks=pytest.mark.slow), 'gradient'],
)
def test_nothing_of_a_spoilt_step_stays_and_it_is_counted(spoilt):
  step, state = build()
  state, _ = step(state, batch(None))
  after, metrics = step(state, batch(spoilt))
  assert np.isfinite(metrics['loss']) == (spoilt == 'gradient')
  assert not np.isfinite(metrics['grad_norm'])
  assert metrics['skipped'] == 1
  assert (after.step, after.nonfinite_streak) == (2, 1)
  assert bits(after) == bits(state)


def test_statistics_that_overflow_are_not_kept():
  step, state = build()
  # The variance behind this kernel overflows; what it divides becomes zero.
  params = jax.tree.map(lambda x: x, state.params)
  params['encoder']['conv0']['kernel'] *= 1e19
  state = state.replace(params=params)
  after, metrics = step(state, batch(None))
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert metrics['skipped'] == 1
  assert bits(after) == bits(state)


def test_a_codebook_that_overflows_is_not_kept():
  step, state = build()
  state, _ = step(state, batch(None))
  sums = state.codebook['vq']['embedding_sum']
  book = state.codebook['vq'] | {'embedding_sum': sums.at[3, 1].set(jnp.inf)}
  state = state.replace(codebook={'vq': book})
  after, metrics = step(state, batch(None))
  assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])
  assert metrics['skipped'] == 1
  assert bits(after) == bits(state)


def test_nine_spoilt_steps_are_forgiven_and_ten_are_not():
  step, state = build()
  for count in (MAX_NONFINITE_STREAK - 1, MAX_NONFINITE_STREAK):
    after = state
    for _ in range(count):
      after, _ = step(after, batch(np.nan))
    after, metrics = step(after, batch(None))
    forgiven = count < MAX_NONFINITE_STREAK
    assert (bits(after) != bits(state)) == forgiven
    assert metrics['skipped'] == (not forgiven)
    assert after.nonfinite_streak == (0 if forgiven else count + 1)


@pytest.mark.slow
def test_a_skipped_step_leaves_its_line_of_the_log_readable(
  tiny_config, tmp_path, log_of, monkeypatch
):
  tiny_config.num_steps = 4
  factors, next_batch = iter([np.nan, 1, 1, 1]), loop.Prefetch.next_batch
  monkeypatch.setattr(
    loop.Prefetch,
    'next_batch',
    lambda self: {'image': next_batch(self)['image'] * float(next(factors))},
  )
  loop.train(tiny_config, tmp_path)
  log = log_of(tmp_path)
  assert (log[2, 'train/skipped'], log[4, 'train/skipped']) == (0.5, 0)
  assert None not in log.values()


@pytest.mark.slow
def test_a_learning_rate_of_a_million_stops_the_run(
  tiny_config, tmp_path, steps_of
):
  tiny_config.optimizer.learning_rate = 1e6
  tiny_config.num_steps = 40
  tiny_config.log_every = 15  # the host looks late
  tiny_config.checkpoint_every = 1
  tiny_config.eval_every = 0
  with pytest.raises(FloatingPointError) as caught:
    loop.train(tiny_config, tmp_path)
  message = str(caught.value)
  assert 'stopped at step 11: for 10 steps in a row, from step 2 on' in message
  assert 'the loss was nan' in message and 'learning_rate' in message
  assert '\n' not in message
  # The step before the first that was not finite, and nothing after it.
  assert steps_of(tmp_path) == [1]
  with Checkpoints(tmp_path) as checkpoints:
    state = loop.Run(tiny_config).start(checkpoints)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
