"""What the optimizer and the flips of a config do to a train step.

The models are so small that the arithmetic of a step can be written down.
"""

import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_step import IMAGES, first_moment, step_of

from rvq_jax.training.config import check_config


def result(reconstruction):
  zero = jnp.zeros(())
  quantizer = types.SimpleNamespace(loss=zero, metrics={}, counts=zero)
  return types.SimpleNamespace(
    reconstruction=reconstruction, quantizer=quantizer
  )


class Affine(nn.Module):
  """kernel x image + bias, in the form of a `VQVAE`."""

  @nn.compact
  def __call__(self, images, *, train=False, mask=None, quantize=True):
    kernel = self.param('kernel', nn.initializers.ones, (1, 1, 1, 3))
    bias = self.param('bias', nn.initializers.ones, (1, 1, 1, 3))
    return result(kernel * images + bias)


@pytest.fixture(scope='module')
def affine_steps(make_step_config):
  """Returns a function of fields of the optimizer: states of three steps."""

  def take(skipped=None, **fields):
    named = {f'optimizer.{name}': value for name, value in fields.items()}
    flat = check_config(make_step_config(named))
    state, step = step_of(flat, Affine())
    states = [state]
    for i in range(3):
      spoilt = np.nan if i == skipped else 1
      state, _ = step(state, {'image': IMAGES * np.float32(spoilt)})
      states.append(state)
    return states

  return take


def biases(states):
  return np.stack([np.asarray(s.params['bias']).ravel() for s in states])


def sizes(states):
  """How far the bias, whose gradient keeps its sign, moves in each step."""
  return np.abs(np.diff(biases(states), axis=0)).max(1)


def test_learning_rate_schedule_and_warmup_scale_the_steps(affine_steps):
  # Adam's steps are as long as the learning rate while the gradient is steady.
  def expect(rates, **fields):
    got = sizes(affine_steps(weight_decay=0.0, **fields))
    np.testing.assert_allclose(got, rates, rtol=2e-2, atol=1e-7)

  expect([1e-3] * 3, learning_rate=1e-3, schedule='constant')
  cosine = 1e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 4))
  expect(cosine, learning_rate=1e-3)
  warm = {'warmup_steps': 2, 'schedule': 'constant'}
  expect([0, 5e-4, 1e-3], learning_rate=1e-3, **warm)


def test_the_schedule_counts_skipped_steps(affine_steps):
  fields = {'learning_rate': 1e-3, 'weight_decay': 0.0}
  got = sizes(affine_steps(skipped=0, **fields))
  cosine = 1e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(3) / 4))
  np.testing.assert_allclose(got, [0, *cosine[1:]], rtol=2e-2, atol=1e-7)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(affine_steps):
  free = affine_steps()[1]
  clipped = affine_steps(clip_norm=1e-2)[1]
  assert optax.tree.norm(first_moment(free)) > 0.1 * 1e-2 * 10
  norm = optax.tree.norm(first_moment(clipped))
  np.testing.assert_allclose(norm, 0.1 * 1e-2, rtol=1e-4)


def test_averaged_parameters_follow_at_the_configs_decay(affine_steps):
  assert affine_steps()[0].averages is None
  states = affine_steps(params_ema=0.75, learning_rate=0.1)
  average = 1.0
  for state in states[1:]:
    average = 0.75 * average + 0.25 * np.asarray(state.params['bias'])
    got = state.averages['params']['bias']
    np.testing.assert_allclose(got, average, rtol=1e-5)


def test_a_step_mirrors_half_of_the_images(make_step_config):
  flat = check_config(make_step_config({'optimizer.learning_rate': 0.0}))
  # White on the left, black on the right; mirrored, an image is its negative.
  images = np.ones((400, 8, 8, 3), np.float32)
  images[:, :, 4:] = -1

  class Left(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False, mask=None, quantize=True):
      zero = self.param('kernel', nn.initializers.zeros, ())
      return result(jnp.asarray(images[:1]) + zero)

  shares = []
  for options in ({'flip': True}, {'flip': True, 'seed': 1}, {}):
    state, step = step_of(flat, Left(), **options)
    for _ in range(2):
      state, metrics = step(state, {'image': images})
      shares.append(float(metrics['mse']) / 4)
  assert shares[4:] == [0, 0]
  assert all(0.4 < share < 0.6 for share in shares[:4])
  assert len(set(shares[:4])) > 1
