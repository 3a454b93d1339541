"""The schedule's values, what decays, what is frozen, what a step moves.

A model may be so small that the arithmetic of a step can be written down.
"""

import re
import types

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import one_line
from tiny_step import IMAGES, assert_close, named_bits, step_of

from rvq_jax.training.config import check_config
from rvq_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from rvq_jax.training.state import idle_parts

PARAMS = {
  'conv': {'kernel': jnp.ones(3), 'bias': jnp.ones(3)},
  'bn': {'scale': jnp.ones(3)},
  'vq': {'embedding': jnp.ones(3)},
}
COSINE = 0.5 * (1 + np.cos(np.pi * np.arange(3) / 4))


def test_the_schedule_warms_up_in_a_line_and_a_cosine_to_zero_follows():
  schedule = make_schedule(2e-4, num_steps=100)
  got = [float(schedule(step)) for step in (0, 25, 50, 100)]
  want = 2e-4 * 0.5 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 1])))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)
  schedule = make_schedule(1.0, num_steps=110, warmup_steps=10)
  got = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
  np.testing.assert_allclose(got, [0, 0.5, 1, 0.5, 0], atol=1e-6)
  with one_line('less than the 10 steps of the run, got 10'):
    make_schedule(1.0, num_steps=10, warmup_steps=10)


def update(optimizer, grads, state=None, params=PARAMS, freeze=''):
  """Updates and state after step 0, from a new state if none is given."""
  state = optimizer.init(params) if state is None else state
  idle = idle_parts(freeze)
  return optimizer.update(grads, state, params, step=0, idle=idle)


def test_only_kernels_decay():
  optimizer = make_optimizer(lambda _: 0.1, weight_decay=0.5)
  updates, _ = update(optimizer, jax.tree.map(jnp.zeros_like, PARAMS))
  updates = flax.traverse_util.flatten_dict(updates, sep='/')
  assert [n for n, x in updates.items() if np.any(x)] == ['conv/kernel']
  np.testing.assert_allclose(updates['conv/kernel'], -0.05, rtol=1e-6)


def test_updates_are_those_of_optax_at_the_step_of_the_schedule():
  schedule = make_schedule(0.1, num_steps=9, warmup_steps=2)
  ours = make_optimizer(schedule, weight_decay=0.3, b2=0.9, clip_norm=1.0)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.9, weight_decay=0.3, mask=decay_mask),
  )
  state, other = ours.init(PARAMS), theirs.init(PARAMS)
  rng = np.random.default_rng(0)
  for step in range(4):
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f'), PARAMS)
    got, state = ours.update(grads, state, PARAMS, step=step)
    want, other = theirs.update(grads, other, PARAMS)
    assert_close(got, want, rtol=1e-6, atol=0)
  late, _ = ours.update(grads, state, PARAMS, step=9)  # the cosine's end
  assert not any(np.any(x) for x in jax.tree.leaves(late))


def test_frozen_codes_ignore_the_momentum_and_keep_the_state():
  optimizer = make_optimizer(lambda _: 0.1)
  _, state = update(optimizer, PARAMS)
  want, free = update(optimizer, PARAMS, state)
  # A run may resume with another `freeze`.
  got, after = update(optimizer, PARAMS, state, freeze='codes')
  assert jnp.all(want['vq']['embedding'] < -0.01)  # momentum
  want['vq']['embedding'] = jnp.zeros(3)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  old, after, free = map(named_bits, (state, after, free))
  kept = {name for name in free if after[name] != free[name]}
  assert kept == {name for name in free if re.search("'(vq|codes)'", name)}
  assert all(after[name] == old[name] for name in kept)


CODES = {'vq/embedding', 'vq/level_0/embedding', 'vq/map/kernel'}
CODES |= {'vq/phi_0/kernel'}


@pytest.mark.parametrize(
  ('freeze', 'kept'),
  [
    ('', set()),
    ('codes', CODES),
    ('encoder', {'encoder/conv0/kernel'}),
    ('encoder,codes', CODES | {'vq/logits/bias', 'encoder/conv0/kernel'}),
  ],
)
def test_what_is_frozen_gets_no_update_and_no_share_of_the_clipped_norm(
  freeze, kept
):
  others = {'vq/logits/bias', 'encoder/conv0/kernel', 'decoder/up0/kernel'}
  params = flax.traverse_util.unflatten_dict(
    {tuple(name.split('/')): jnp.ones(1) for name in CODES | others}
  )
  optimizer = make_optimizer(lambda _: 1.0, clip_norm=1e-3)
  updates, state = update(optimizer, params, params=params, freeze=freeze)
  updates = flax.traverse_util.flatten_dict(updates, sep='/')
  assert {name for name, x in updates.items() if not x} == kept
  moment = optax.tree.get(state, 'mu')['decoder']['up0']['kernel']
  # 7 arrays of one number: of their norm each free one has its share.
  np.testing.assert_allclose(moment, 1e-4 / np.sqrt(7 - len(kept)), rtol=1e-4)


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


@pytest.mark.parametrize(
  ('fields', 'skipped', 'rates'),
  [
    ({'schedule': 'constant'}, None, [1, 1, 1]),
    ({}, None, COSINE),
    ({'schedule': 'constant', 'warmup_steps': 2}, None, [0, 0.5, 1]),
    ({}, 0, [0, *COSINE[1:]]),  # a skipped step counts
  ],
)
def test_steps_are_as_long_as_the_schedule_says(
  fields, skipped, rates, make_step_config
):
  fields = {'learning_rate': 1e-3, 'weight_decay': 0.0} | fields
  named = {f'optimizer.{name}': value for name, value in fields.items()}
  state, step = step_of(check_config(make_step_config(named)), Affine())
  biases = [state.params['bias']]
  for i in range(3):
    spoilt = np.float32(np.nan if i == skipped else 1)
    state, _ = step(state, {'image': IMAGES * spoilt})
    biases.append(state.params['bias'])
  # Adam's steps are as long as the rate while the gradient keeps its sign.
  lengths = np.abs(np.diff(biases, axis=0)).max((1, 2, 3, 4))
  np.testing.assert_allclose(
    lengths, 1e-3 * np.array(rates), rtol=2e-2, atol=1e-7
  )


class Late(nn.Module):
  """kernel x image, + vq if it is quantized."""

  @nn.compact
  def __call__(self, images, *, train=False, mask=None, quantize=True):
    kernel = self.param('kernel', nn.initializers.ones, (1, 1, 1, 3))
    code = self.param('vq', lambda _: {'embedding': jnp.ones((1, 1, 1, 3))})
    return result(kernel * images + code['embedding'] * quantize)


@pytest.mark.parametrize('fields', [{'quantize': False}, {'freeze': 'codes'}])
def test_what_learns_late_moves_no_faster_than_the_rate(
  fields, make_step_config
):
  rate = {'optimizer.learning_rate': 1e-4, 'optimizer.schedule': 'constant'}
  flat = check_config(make_step_config(rate))
  state, step = step_of(flat, Late(), flip=False)
  _, idle = step_of(flat, Late(), flip=False, **fields)
  codes = []
  for number in range(540):
    codes.append(state.params['vq']['embedding'])
    state, _ = (idle if number < 500 else step)(state, {'image': IMAGES})
  lengths = np.abs(np.diff(codes, axis=0)).max((1, 2, 3, 4))
  np.testing.assert_allclose(lengths, [0] * 500 + [1e-4] * 39, rtol=2e-2)


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
