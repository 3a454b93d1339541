"""Microbatches: averaged gradients, a codebook that each of them updates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_vqvae

from rvq_jax import sharding
from rvq_jax.models.layers import Norm
from rvq_jax.training.run import RUNS_ONCE
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step

IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype('f')
RATE = 0.3
QUANTIZERS = {
  'vq': {'codebook_size': 40, 'decay': 0.7, 'dead_code_threshold': 0.0},
  'replaced': {'codebook_size': 40, 'decay': 0.3, 'dead_code_threshold': 2.0},
  'learned': {'codebook_size': 40, 'ema': False},
  'residual': {'name': 'residual', 'codebook_size': 20, 'depth': 2},
  'multiscale': {'name': 'multiscale', 'codebook_size': 20, 'sides': (1, 2)},
}


def without_batch_norm(next_function, args, kwargs, context):
  """BatchNorm by its running statistics, which do not see the batch."""
  if isinstance(context.module, Norm):
    kwargs = kwargs | {'train': False}
  return next_function(*args, **kwargs)


def build(quantizer, axis_name=None, **options):
  model = tiny_vqvae(
    vq=QUANTIZERS[quantizer],
    axis_name=axis_name,
  )
  optimizer = optax.sgd(RATE)
  step = make_train_step(
    model, optimizer, flip=False, axis_name=axis_name, **options
  )
  return model, optimizer, step


@functools.cache
def start(quantizer):
  """A state whose codebook is filled: after one step of the whole batch."""
  model, optimizer, step = build(quantizer)
  state = jax.jit(
    lambda: create_state(
      model, optimizer, jax.random.key(0), image_size=8, batch_size=16
    ),
    compiler_options=RUNS_ONCE,
  )()
  with nn.intercept_methods(without_batch_norm):
    return jax.device_get(jax.jit(step)(state, {'image': IMAGES})[0])


def run(quantizer, wrap=jax.jit, images=IMAGES, **options):
  step = wrap(build(quantizer, **options)[2])
  with nn.intercept_methods(without_batch_norm):
    return jax.device_get(step(start(quantizer), {'image': images}))


def loop_over_microbatches(quantizer, steps):
  """The same in Python: parameters and codebook after one step, metrics."""
  model, state = build(quantizer)[0], start(quantizer)
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


def assert_close(got, want):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      x, y, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
  'quantizer',
  [
    pytest.param('vq', marks=pytest.mark.slow),
    pytest.param('learned', marks=pytest.mark.slow),
    pytest.param('residual', marks=pytest.mark.slow),
    pytest.param('multiscale', marks=pytest.mark.slow),
  ],
)
def test_microbatches_are_a_loop_that_updates_the_codebook_each_time(quantizer):
  state, metrics = run(quantizer, accumulate_steps=4)
  params, codebook, loss, counts = loop_over_microbatches(quantizer, 4)
  assert_close(state.params, params)
  assert_close(state.codebook, codebook)
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
def test_microbatches_differ_from_the_whole_batch_in_the_codebook_alone():
  (one, _), (four, _) = (run('vq', accumulate_steps=s) for s in (1, 4))
  sizes = [s.codebook['vq']['cluster_size'] for s in (one, four)]
  assert np.max(np.abs(sizes[0] - sizes[1])) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('quantizer', ['vq', 'replaced'])
@pytest.mark.parametrize('axis_name', [None, 'data'])
def test_microbatches_over_devices_give_the_same_update(quantizer, axis_name):
  mesh = sharding.data_mesh(jax.devices('cpu')[:4])
  everywhere = sharding.replicated(mesh)

  def wrap(step):
    if axis_name:
      step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P('data')), out_specs=(P(), P())
      )
    return jax.jit(
      step,
      in_shardings=(everywhere, sharding.by_rows(mesh)),
      out_shardings=everywhere,
    )

  got = run(quantizer, wrap, accumulate_steps=2, axis_name=axis_name)
  want = run(quantizer, accumulate_steps=2)
  for part in ('params', 'codebook'):
    assert_close(getattr(got[0], part), getattr(want[0], part))
  if quantizer == 'replaced':
    assert want[1]['replaced_codes'] > 0


@pytest.mark.slow
def test_a_microbatch_that_is_not_finite_leaves_the_state_bit_exact():
  images = IMAGES.copy()
  images[5, 2, 3, 0] = np.nan
  after, metrics = run('vq', images=images, accumulate_steps=4)
  assert metrics['skipped'] == 1
  for part in ('params', 'batch_stats', 'codebook'):
    for x, y in zip(
      *(jax.tree.leaves(getattr(s, part)) for s in (after, start('vq'))),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
