"""Microbatches give the update of the whole batch, at their own memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rvq_jax import VQVAE
from rvq_jax.models.layers import Norm
from rvq_jax.training import sharding
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step

STEPS = 3
IMAGES = np.random.default_rng(0).integers(
  0, 256, (STEPS, 16, 8, 8, 3), np.uint8
)
QUANTIZERS = {
  'vq': {'decay': 0.7},
  'residual': {'name': 'residual', 'depth': 2},
  'product': {'name': 'product', 'heads': 2, 'code_dim': 2},
  'learned': {'ema': False},
}


def without_batch_norm(next_function, args, kwargs, context):
  """BatchNorm by its running statistics, which do not see the batch."""
  if isinstance(context.module, Norm):
    kwargs = kwargs | {'train': False}
  return next_function(*args, **kwargs)


def build(quantizer, axis_name=None, **options):
  model = VQVAE(
    widths=(4, 8),
    factor=4,
    num_res_blocks=1,
    num_heads=2,
    code_dim=4,
    quantizer={'codebook_size': 40} | QUANTIZERS[quantizer],
    axis_name=axis_name,
  )
  optimizer = optax.sgd(0.3)
  step = make_train_step(model, optimizer, axis_name=axis_name, **options)
  return model, optimizer, step


@functools.cache
def start(quantizer):
  model, optimizer, _ = build(quantizer)
  return jax.device_get(
    jax.jit(
      lambda: create_state(model, optimizer, jax.random.key(0), image_size=8)
    )()
  )


def run(quantizer, wrap=jax.jit, *, frozen_norm=True, **options):
  state = start(quantizer)
  step = wrap(build(quantizer, **options)[2])
  for images in IMAGES:
    # The context is seen by the tracing of the first call.
    if frozen_norm:
      with nn.intercept_methods(without_batch_norm):
        state, metrics = step(state, {'image': images})
    else:
      state, metrics = step(state, {'image': images})
  return jax.device_get((state, metrics))


@functools.cache
def whole_batch(quantizer):
  return run(quantizer)


def assert_same(got, want):
  state, metrics = got
  want_state, want_metrics = want
  for part in ('params', 'codebook'):
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(getattr(state, part)),
      jax.tree.leaves(getattr(want_state, part)),
      strict=True,
    ):
      np.testing.assert_allclose(
        x, y, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path)
      )
  assert metrics.keys() == want_metrics.keys()
  for name, value in want_metrics.items():
    np.testing.assert_allclose(
      metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize(
  ('quantizer', 'steps'),
  [
    ('vq', 4),
    *(
      pytest.param(name, 4, marks=pytest.mark.slow)
      for name in ('residual', 'product', 'learned')
    ),
  ],
)
def test_microbatches_give_the_update_of_the_whole_batch(quantizer, steps):
  assert_same(run(quantizer, accumulate_steps=steps), whole_batch(quantizer))


def test_the_whole_batch_replaces_codes_and_its_codes_differ():
  # Otherwise the test above would not see the codebook's movement.
  state, metrics = whole_batch('vq')
  assert metrics['replaced_codes'] > 0
  assert np.any(state.codebook['vq']['embedding'] != 0)
  assert not np.array_equal(
    state.codebook['vq']['cluster_size'],
    start('vq').codebook['vq']['cluster_size'],
  )


def sharded_jit(step):
  mesh = sharding.data_mesh(jax.devices('cpu')[:4])
  everywhere = sharding.replicated(mesh)
  return jax.jit(
    step,
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )


def shard_map(step):
  mesh = sharding.data_mesh(jax.devices('cpu')[:2])
  return jax.jit(
    jax.shard_map(
      step, mesh=mesh, in_specs=(P(), P('data')), out_specs=(P(), P())
    )
  )


@pytest.mark.parametrize(
  ('wrap', 'axis_name'),
  [
    pytest.param(sharded_jit, None, marks=pytest.mark.slow),
    pytest.param(shard_map, 'data', marks=pytest.mark.slow),
  ],
)
def test_microbatches_over_devices_give_the_same_update(wrap, axis_name):
  got = run('vq', wrap, accumulate_steps=2, axis_name=axis_name)
  assert_same(got, whole_batch('vq'))


@pytest.mark.slow
def test_running_statistics_take_one_step_a_batch():
  # Microbatches of the same images have the same statistics, to the bit.
  model, optimizer, _ = build('vq')
  four = np.repeat(IMAGES[0, :4], 4, axis=0)
  one = jax.jit(make_train_step(model, optimizer, flip=False))
  many = jax.jit(
    make_train_step(model, optimizer, flip=False, accumulate_steps=4)
  )
  (want, _), (got, _) = (f(start('vq'), {'image': four}) for f in (one, many))
  for x, y in zip(
    *map(jax.tree.leaves, (got.batch_stats, want.batch_stats)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_bad_microbatch_leaves_the_state_to_the_bit():
  model, optimizer, _ = build('vq')
  step = jax.jit(
    make_train_step(model, optimizer, flip=False, accumulate_steps=4)
  )
  images = (IMAGES[0] / 127.5 - 1).astype(np.float32)
  images[5, 2, 3, 0] = np.nan
  after, metrics = step(start('vq'), {'image': images})
  assert metrics['skipped'] == 1
  for part in ('params', 'batch_stats', 'codebook'):
    for x, y in zip(
      *(jax.tree.leaves(getattr(s, part)) for s in (after, start('vq'))),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_memory_is_that_of_a_microbatch():
  def temporary_bytes(batch, steps):
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)
    step = jax.jit(build('vq', accumulate_steps=steps)[2])
    compiled = step.lower(start('vq'), {'image': images}).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary_bytes(16, 1), temporary_bytes(128, 1)
  accumulated = temporary_bytes(128, 8)
  assert large > 5 * small
  latents = 128 * 8 * 8 * 4 * 4
  images = 128 * 32 * 32 * 3
  assert accumulated < 1.5 * small + 4 * (latents + images)
