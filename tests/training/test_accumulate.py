"""Microbatches: averaged gradients, a codebook that each of them updates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import (
  IMAGES,
  RATE,
  assert_close,
  first_state,
  jitted,
  kept,
  take,
  tiny_step,
)

from rvq_jax.models.layers import Norm

QUANTIZERS = {
  'vq': {'codebook_size': 40, 'decay': 0.7, 'dead_code_threshold': 0.0},
  'learned': {'codebook_size': 40, 'ema': False},
  'residual': {'name': 'residual', 'codebook_size': 20, 'depth': 2},
  'multiscale': {'name': 'multiscale', 'codebook_size': 20, 'sides': (1, 2)},
}
GUMBEL = {'name': 'gumbel', 'temperature_steps': 8}


def without_batch_norm(next_function, args, kwargs, context):
  """BatchNorm by its running statistics, which do not see the batch."""
  if isinstance(context.module, Norm):
    kwargs = kwargs | {'train': False}
  return next_function(*args, **kwargs)


def run(quantizer, state, images=IMAGES, **fields):
  step = jitted(tiny_step(QUANTIZERS[quantizer], flip=False, **fields))
  with nn.intercept_methods(without_batch_norm):
    return jax.device_get(step(state, {'image': images}))


@functools.cache
def start(quantizer):
  """A state whose codebook is filled: after one step of the whole batch."""
  return run(quantizer, first_state(tiny_step(QUANTIZERS[quantizer])))[0]


def loop_over_microbatches(quantizer, steps):
  """The same in Python: parameters and codebook after one step, metrics."""
  model, state = tiny_step(QUANTIZERS[quantizer]).model, start(quantizer)
  codebook, grads, losses, counts = state.codebook, [], [], 0

  def loss_fn(params, codebook, images):
    variables = {'batch_stats': state.batch_stats, 'codebook': codebook}
    out, updates = model.apply(
      variables | {'params': params}, images, train=True, mutable=['codebook']
    )
    loss = jnp.mean((out.reconstruction - images) ** 2) + out.quantizer.loss
    return loss, (updates.get('codebook', {}), out.quantizer.counts)

  step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  for s in range(steps):
    with nn.intercept_methods(without_batch_norm):
      (loss, (codebook, n)), grad = step(
        state.params, codebook, IMAGES[s::steps]
      )
    grads.append(grad)
    losses.append(loss)
    counts = counts + n
  mean = jax.tree.map(lambda *g: sum(g) / steps, *grads)
  params = jax.tree.map(lambda p, g: p - RATE * g, state.params, mean)
  return params, codebook, np.mean(losses), np.asarray(counts)


@pytest.mark.slow
def test_a_schedule_inside_a_layer_follows_steps_and_not_microbatches():
  step = tiny_step(GUMBEL, accumulate_steps=4)
  state, temperatures = first_state(step), []
  for _ in range(3):
    state, metrics = take(step, state)
    temperatures.append(metrics['temperature'])
  assert state.codebook['vq']['step'] == 3
  want = 1 / 16 + 15 / 16 * np.cos(np.pi / 2 * np.arange(3) / 8) ** 2
  np.testing.assert_allclose(temperatures, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('quantizer', QUANTIZERS)
def test_microbatches_are_a_loop_that_updates_the_codebook_each_time(quantizer):
  state, metrics = run(quantizer, start(quantizer), accumulate_steps=4)
  params, codebook, loss, counts = loop_over_microbatches(quantizer, 4)
  assert_close((state.params, state.codebook), (params, codebook))
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-4)
  np.testing.assert_array_equal(metrics['counts'], counts)
  p = counts.reshape(-1, counts.shape[-1])
  p = p / p.sum(1, keepdims=True)
  entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
  np.testing.assert_allclose(metrics['usage'], np.mean(counts > 0), rtol=1e-5)
  np.testing.assert_allclose(
    metrics['perplexity'], np.mean(np.exp(entropy)), rtol=1e-4
  )
  assert state.step == start(quantizer).step + 1


@pytest.mark.slow
def test_a_microbatch_that_is_not_finite_leaves_the_state_bit_exact():
  images, state = IMAGES.copy(), start('vq')
  images[5, 2, 3, 0] = np.nan
  after, metrics = run('vq', state, images, accumulate_steps=4)
  assert metrics['skipped'] == 1
  assert kept(after) == kept(state)
