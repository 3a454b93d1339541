"""1, 2, 4 and 8 devices take the same steps under jit, pmap and shard_map."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_step import (
  ADVERSARIAL,
  IMAGES,
  adversarial_state,
  assert_close,
  bits,
  first_state,
  over_devices,
  take,
  tiny_step,
)

from rvq_jax import sharding
from rvq_jax.training.validation import compile_eval_step

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
REPLACED = {'codebook_size': 40, 'dead_code_threshold': 0.7}
STEPS = {
  'plain': {'vq': REPLACED, 'colors': True},
  # Fewer codes than the 32 vectors of a microbatch: no two are filled alike.
  'accumulate': {
    'vq': REPLACED | {'codebook_size': 20, 'decay': 0.3},
    'accumulate_steps': 2,
  },
  'adversarial': ADVERSARIAL,
  'both': ADVERSARIAL | {'accumulate_steps': 2},
}


def start(name):
  step = tiny_step(**STEPS[name])
  return adversarial_state(step, 12) if step.adversarial else first_state(step)


def pmapped(step, devices):
  """The step as a function of a global batch, under `pmap`."""
  program = jax.pmap(step, axis_name='data', devices=devices)

  def call(state, batch):
    split = lambda x: x.reshape(len(devices), -1, *x.shape[1:])  # noqa: E731
    copies = jax.tree.map(lambda x: np.stack([x] * len(devices)), state)
    results = jax.device_get(program(copies, jax.tree.map(split, batch)))
    first, last = (jax.tree.map(lambda x, i=i: x[i], results) for i in (0, -1))
    assert bits(first) == bits(last)  # the replicas have not drifted
    return first

  return call


@functools.cache
def three_steps(name, way, count):
  """State and metrics after each of three steps on `count` devices."""
  devices = jax.devices('cpu')[:count]
  step = tiny_step(axis_name=None if way == 'jit' else 'data', **STEPS[name])
  mesh = sharding.data_mesh(devices)
  call = pmapped(step, devices) if way == 'pmap' else over_devices(step, mesh)
  state, results = start(name), []
  for i in range(3):
    state, metrics = call(state, {'image': np.roll(IMAGES, 3 * i, axis=1)})
    results.append(jax.device_get((state, metrics)))
  return results


@pytest.mark.parametrize(
  ('name', 'way', 'count'),
  [
    # test_pairs.py has steps of eight devices in the default suite.
    slow('adversarial', 'jit', 8),
    *(slow('plain', 'jit', count) for count in (2, 4, 8)),
    *(slow('plain', 'shard_map', count) for count in (1, 2, 4, 8)),
    *(slow('plain', 'pmap', count) for count in (1, 2, 4, 8)),
    *(slow('accumulate', way, 4) for way in ('jit', 'shard_map')),
    slow('adversarial', 'shard_map', 8),
    slow('both', 'shard_map', 4),
  ],
)
def test_devices_take_the_steps_of_one(name, way, count):
  got, want = three_steps(name, way, count), three_steps(name, 'jit', 1)
  steps = slice(None) if 'discriminator_loss' not in want[0][1] else slice(1)
  for (state, metrics), (one, one_metrics) in zip(
    got[steps], want[steps], strict=True
  ):
    for part in ('params', 'batch_stats', 'codebook'):
      assert_close(getattr(state, part), getattr(one, part))
    assert_close(metrics, one_metrics, rtol=2e-3)
    if state.discriminator is not None:
      assert_close(of_discriminator(state), of_discriminator(one), rtol=2e-3)
  if name == 'accumulate':
    assert sum(metrics['replaced_codes'] for _, metrics in want) > 0


def of_discriminator(state):
  """D's gradient, which its moment shows, and LeCAM's averages."""
  part = state.discriminator
  moment = optax.tree.get(part['opt_state'], 'mu')
  return moment, part['logits_real'], part['logits_fake']


@pytest.mark.slow
def test_the_steps_moved_everything():
  state, _ = three_steps('plain', 'jit', 1)[-1]
  for part in ('params', 'batch_stats', 'codebook'):
    before, after = (bits(getattr(s, part)) for s in (start('plain'), state))
    moved = [x != y for x, y in zip(before, after, strict=True)]
    assert np.mean(moved) > 0.9, part


@pytest.mark.slow
def test_adversarial_microbatches_give_the_update_of_the_whole_batch():
  # Nothing in this model depends on how a batch is divided.
  whole, parts = (
    take(tiny_step(flip=False, **STEPS[name]), start(name))
    for name in ('adversarial', 'both')
  )
  for got, want in (
    (parts[0].params, whole[0].params),
    (of_discriminator(parts[0]), of_discriminator(whole[0])),
    (parts[1], whole[1]),
  ):
    assert_close(got, want, rtol=2e-3)


@pytest.mark.slow
def test_a_step_gathers_no_vectors_of_other_devices():
  # 64 of them in the global batch: they grow with the number of devices.
  step = tiny_step(REPLACED | {'codebook_size': 4096}, colors=True)
  mesh, batch = sharding.data_mesh(jax.devices('cpu')[:4]), {'image': IMAGES}
  lowered = over_devices(step, mesh).lower(first_state(step), batch)
  program = lowered.compile().as_text()
  gathered = re.findall(r'= (\S+?)(?:\{\S*)? all-gather\(', program)
  assert 'f32[64]' in gathered  # the noise of the draw: one number per vector
  assert [x for x in gathered if re.match(r'f32\[64,', x)] == []


def test_evaluation_sums_agree_over_devices():
  model, variables = tiny_step(REPLACED).model, start('plain').eval_variables
  batch = {'image': jnp.asarray(IMAGES), 'mask': np.arange(16) < 11}
  one, many = (
    compile_eval_step(model, sharding.data_mesh(jax.devices('cpu')[:count]))
    for count in (1, 8)
  )
  got, want = (f(variables, batch) for f in (many, one))
  assert want['images'] == 11
  assert_close(got, want, rtol=1e-4, atol=1e-4)
