"""1, 2, 4 and 8 devices take the same steps under jit, pmap and shard_map."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_vqvae

from rvq_jax import sharding
from rvq_jax.training.run import RUNS_ONCE
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step
from rvq_jax.training.validation import make_eval_step

STEPS = 3
IMAGES = np.random.default_rng(0).integers(
  0, 256, (STEPS, 16, 8, 8, 3), np.uint8
)


def build(axis_name=None, codebook_size=40):
  model = tiny_vqvae(
    vq={'codebook_size': codebook_size, 'dead_code_threshold': 0.7},
    axis_name=axis_name,
  )
  # Adam divides by the gradient's size, which magnifies rounding; SGD shows
  # the gradient itself.
  optimizer = optax.sgd(0.3)
  step = make_train_step(model, optimizer, colors=True, axis_name=axis_name)
  return model, optimizer, step


@functools.cache
def start():
  model, optimizer, _ = build()
  return jax.device_get(
    jax.jit(
      lambda: create_state(
        model, optimizer, jax.random.key(0), image_size=8, batch_size=16
      ),
      compiler_options=RUNS_ONCE,
    )()
  )


def run_jit(devices):
  mesh = sharding.data_mesh(jax.devices('cpu')[:devices])
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    build()[2],
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  state = jax.device_put(start(), everywhere)
  for images in IMAGES:
    batch = sharding.shard_batch({'image': images}, mesh)
    state, metrics = step(state, batch)
  return jax.device_get((state, metrics))


def run_shard_map(devices):
  mesh = sharding.data_mesh(jax.devices('cpu')[:devices])
  step = jax.jit(
    jax.shard_map(
      build('data')[2],
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=(P(), P()),
    )
  )
  state = jax.device_put(start(), sharding.replicated(mesh))
  for images in IMAGES:
    state, metrics = step(state, {'image': jnp.asarray(images)})
  return jax.device_get((state, metrics))


def run_pmap(devices):
  step = jax.pmap(
    build('data')[2], axis_name='data', devices=jax.devices('cpu')[:devices]
  )
  state = jax.tree.map(lambda x: np.stack([x] * devices), start())
  for images in IMAGES:
    state, metrics = step(
      state, {'image': images.reshape(devices, -1, *images.shape[1:])}
    )
  first, last = (
    jax.tree.map(lambda x, i=i: np.asarray(x)[i], (state, metrics))
    for i in (0, -1)
  )
  for x, y in zip(*map(jax.tree.leaves, (first, last)), strict=True):
    np.testing.assert_array_equal(x, y)  # the replicas have not drifted
  return first


RUNS = {
  'jit': run_jit,
  'shard_map': run_shard_map,
  'pmap': run_pmap,
}


@functools.cache
def one_device():
  return run_jit(1)


@pytest.mark.parametrize(
  ('name', 'devices'),
  [
    ('jit', 8),
    pytest.param('shard_map', 2, marks=pytest.mark.slow),
    pytest.param('pmap', 4, marks=pytest.mark.slow),
    pytest.param('jit', 2, marks=pytest.mark.slow),
    pytest.param('jit', 4, marks=pytest.mark.slow),
    pytest.param('shard_map', 1, marks=pytest.mark.slow),
    pytest.param('shard_map', 4, marks=pytest.mark.slow),
    pytest.param('shard_map', 8, marks=pytest.mark.slow),
    pytest.param('pmap', 1, marks=pytest.mark.slow),
    pytest.param('pmap', 2, marks=pytest.mark.slow),
    pytest.param('pmap', 8, marks=pytest.mark.slow),
  ],
)
def test_devices_agree_with_one(name, devices):
  state, metrics = RUNS[name](devices)
  want, want_metrics = one_device()
  for part in ('params', 'batch_stats', 'codebook'):
    got = jax.tree_util.tree_leaves_with_path(getattr(state, part))
    for (path, x), y in zip(
      got, jax.tree.leaves(getattr(want, part)), strict=True
    ):
      np.testing.assert_allclose(
        x, y, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path)
      )
  for key, value in want_metrics.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=1e-3, atol=1e-5, err_msg=key
    )


def test_the_steps_moved_everything():
  state, _ = one_device()
  for part in ('params', 'batch_stats', 'codebook'):
    moved = [
      np.any(x != y)
      for x, y in zip(
        *(jax.tree.leaves(getattr(s, part)) for s in (state, start())),
        strict=True,
      )
    ]
    assert np.mean(moved) > 0.9, part


@pytest.mark.slow
def test_a_step_gathers_no_vectors_of_other_devices():
  # 64 of them in the global batch: they grow with the number of devices.
  mesh = sharding.data_mesh(jax.devices('cpu')[:4])
  everywhere = sharding.replicated(mesh)
  model, optimizer, step = build(codebook_size=4096)
  state = jax.eval_shape(
    lambda: create_state(
      model, optimizer, jax.random.key(0), image_size=8, batch_size=16
    )
  )
  step = jax.jit(
    step,
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  program = step.lower(state, {'image': IMAGES[0]}).compile().as_text()
  gathered = re.findall(r'= (\S+?)(?:\{\S*)? all-gather\(', program)
  assert 'f32[64]' in gathered  # the noise of the draw: one number a vector
  assert [x for x in gathered if re.match(r'f32\[64,', x)] == []


def test_evaluation_sums_agree_over_devices():
  model, _, _ = build()
  batch = {'image': IMAGES[0], 'mask': np.arange(16) < 11}
  one = jax.jit(make_eval_step(model))(start().eval_variables, batch)
  mesh = sharding.data_mesh(jax.devices('cpu'))
  many = jax.jit(
    jax.shard_map(
      make_eval_step(build('data')[0], axis_name='data'),
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=P(),
    )
  )(start().eval_variables, batch)
  assert one['images'] == 11
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(many), strict=True
  ):
    key = jax.tree_util.keystr(path)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4, err_msg=key)
