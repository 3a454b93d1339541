"""A run that diverges stops, says where and why, and keeps what was good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import one_line
from tiny_model import tiny_vqvae
from tiny_step import IMAGES, first_state, kept, take

from rvq_jax import VQVAE, sharding
from rvq_jax.training import loop
from rvq_jax.training.optimizer import make_optimizer
from rvq_jax.training.step import MAX_SKIPPED, TrainStep


class Spoilt(VQVAE):
  """A model whose gradient, not its loss, is infinite where asked for."""

  def apply(self, variables, images, **options):
    out, updates = super().apply(variables, images, **options)
    # The mark of a spoilt batch: a value that changes nothing else.
    factor = jnp.where(images[0, 0, 0, 0] == 0.5, jnp.inf, 1.0)
    images = _scale_gradient(out.reconstruction, factor)
    return out.replace(reconstruction=images), updates


@jax.custom_vjp
def _scale_gradient(x, factor):
  del factor
  return x


_scale_gradient.defvjp(
  lambda x, factor: (x, factor), lambda factor, g: (g * factor, None)
)


tiny = tiny_vqvae()
STEP = TrainStep(
  Spoilt(tiny.encoder, tiny.vq, tiny.decoder),
  make_optimizer(lambda _: 1e-2),
  params_ema_decay=0.5,
  flip=False,
)


def spoil(kind, state):
  """The state and the images of a step in which something is not finite."""
  images = IMAGES[:4].copy()
  if kind == 'gradient':
    images[0, 0, 0, 0] = 0.5
  elif kind == 'statistics':
    # The variance behind this kernel overflows; what it divides becomes zero.
    params = jax.tree.map(np.copy, state.params)
    params['encoder']['conv0']['kernel'] *= np.float32(1e19)
    state = state.replace(params=params)
  elif kind == 'codebook':
    sums = state.codebook['vq']['embedding_sum'].copy()
    sums[3, 1] = np.inf
    book = state.codebook['vq'] | {'embedding_sum': sums}
    state = state.replace(codebook={'vq': book})
  else:
    images[1, 2, 3, 0] = kind
  return state, images


@pytest.mark.parametrize(
  ('kind', 'finite'),
  [
    (np.nan, []),
    pytest.param(np.inf, [], marks=pytest.mark.slow),
    ('gradient', ['loss']),
    ('statistics', ['loss', 'grad_norm']),
    ('codebook', ['loss', 'grad_norm']),
  ],
)
def test_nothing_of_a_spoilt_step_stays_and_it_is_counted(kind, finite):
  state, _ = take(STEP, first_state(STEP), IMAGES[:4])
  state, images = spoil(kind, state)
  after, metrics = take(STEP, state, images)
  got = [n for n in ('loss', 'grad_norm') if np.isfinite(metrics[n])]
  assert (got, metrics['skipped']) == (finite, 1)
  assert (after.step, after.nonfinite_streak) == (2, 1)
  assert kept(after) == kept(state)


def test_nine_spoilt_steps_are_forgiven_and_ten_are_not():
  state, images = spoil(np.nan, first_state(STEP))
  for count in (MAX_SKIPPED - 1, MAX_SKIPPED):
    after = state
    for _ in range(count):
      after, _ = take(STEP, after, images)
    after, metrics = take(STEP, after, IMAGES[:4])
    forgiven = count < MAX_SKIPPED
    assert (kept(after) != kept(state)) == forgiven
    assert metrics['skipped'] == (not forgiven)
    assert after.nonfinite_streak == (0 if forgiven else count + 1)


@pytest.mark.slow
def test_a_skipped_step_leaves_its_line_of_the_log_readable(
  tiny_config, tmp_path, log_of, monkeypatch
):
  tiny_config.num_steps = 4
  factors, place = iter([np.nan, 1, 1, 1]), sharding.shard_batch

  def spoil(batch, mesh):
    if 'mask' not in batch:  # a training batch
      batch = {'image': batch['image'] * np.float32(next(factors))}
    return place(batch, mesh)

  monkeypatch.setattr(sharding, 'shard_batch', spoil)
  loop.train(tiny_config, tmp_path)
  log = log_of(tmp_path)
  assert (log[2, 'train/skipped'], log[4, 'train/skipped']) == (0.5, 0)
  assert None not in log.values()


@pytest.mark.slow
def test_a_learning_rate_of_a_million_stops_the_run(
  tiny_config, tmp_path, steps_of, final_bits
):
  tiny_config.optimizer.learning_rate = 1e6
  tiny_config.num_steps, tiny_config.log_every = 40, 15  # the host looks late
  tiny_config.checkpoint_every, tiny_config.eval_every = 1, 0
  message = (
    'stopped at step 11: for 10 steps in a row, from step 2 on, the loss was '
    'nan.* lower config.optimizer.learning_rate or'
  )
  with one_line(message, FloatingPointError):
    loop.train(tiny_config, tmp_path)
  # The step before the first that was not finite, and nothing after it.
  assert steps_of(tmp_path) == [1]
  for name, value in final_bits(tiny_config, tmp_path).items():
    assert np.isfinite(np.frombuffer(value, np.float32)).all(), name
