"""A train step in small, the parts of a run, and runs that are cut off."""

import contextlib
import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_vqvae

from rvq_jax import sharding
from rvq_jax.training import build, loop
from rvq_jax.training.config import check_config
from rvq_jax.training.objective import Objective
from rvq_jax.training.step import TrainStep, compile_init, compile_step

IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype('f')
RATE = 0.3
# Adam divides by the gradient's size, which magnifies rounding; SGD shows the
# gradient itself.
SGD = optax.sgd(RATE)
# Of a step in which D is updated from number 7 on, and counts from 11 on.
ADVERSARIAL = {
  'vq': {'name': 'fsq', 'codebook_size': 64},
  'norm': 'group',
  'objective': Objective(
    pixel='l1', adversarial_weight=2.0, lecam_weight=0.5, num_steps=30
  ),
  'adversarial': True,
}


def tiny_step(vq=None, *, optimizer=SGD, axis_name=None, norm='batch', **rest):
  """A `TrainStep` of `tiny_vqvae`."""
  model = tiny_vqvae(vq, axis_name=axis_name, norm=norm)
  return TrainStep(model, optimizer, axis_name=axis_name, **rest)


@functools.cache
def first_state(step):
  """The state before the first step, on the host."""
  init = compile_init(step, sharding.data_mesh(jax.devices()[:1]), 8, 16)
  return jax.device_get(init(jax.random.key(0)))


def adversarial_state(step, number):
  """The state before that step, with averages of LeCAM other than 0."""
  state = first_state(step)
  averages = {'logits_real': np.float32(0.7), 'logits_fake': np.float32(-0.2)}
  return state.replace(
    step=np.int32(number), discriminator=state.discriminator | averages
  )


jitted = functools.cache(jax.jit)


def take(step, state, images=IMAGES):
  """The next state and metrics, on the host."""
  return jax.device_get(jitted(step)(state, {'image': images}))


def over_devices(step, mesh):
  """The step jitted for a mesh: by `shard_map` if it has an axis_name."""
  everywhere, call = sharding.replicated(mesh), step
  if step.axis_name:
    call = jax.shard_map(
      step, mesh=mesh, in_specs=(P(), P('data')), out_specs=(P(), P())
    )
  return jax.jit(
    call,
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )


def bits(tree):
  """The bytes of all leaves."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def named_bits(tree):
  """path -> bytes of each leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in leaves}


def kept(state):
  """`bits` of all that a skipped step keeps: all but two counters."""
  return bits(state.replace(step=0, nonfinite_streak=0))


def assert_close(got, want, rtol=1e-3, atol=2e-5):
  """The leaves of two trees agree; an error names the leaf."""
  paths = jax.tree_util.tree_leaves_with_path(got)
  for (path, x), y in zip(paths, jax.tree.leaves(want), strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)


class Run:
  """What `loop.train` builds from a config."""

  def __init__(self, config, init=None):
    self.config = check_config(config)
    self.mesh = sharding.data_mesh()
    self.dataset, self.loader = build.build_data(self.config)
    self.step = build.build_step(self.config, self.config['num_steps'])
    sizes = self.config['data.image_size'], self.config['batch_size']
    self.init = compile_init(self.step, self.mesh, *sizes)
    self.key = jax.random.key(self.config['seed'])
    self.template = self.init.eval_shape(self.key)
    self.lpips_weights = self.step.objective.load_lpips(self.mesh)
    self._take, self._given = compile_step(self.mesh), init

  def initial(self):
    """The collections that a new run starts from."""
    return build.build_start(self.config, self._given, self.template)

  def phase(self, i):
    """Step number i, from 1."""
    late = self.config['model.quantize_after']
    return self.step.phase(i, quantize_after=late)

  def train_step(self, i, state, batch):
    """Takes step number i, from 1."""
    return self._take(self.phase(i), state, batch, self.lpips_weights)


def step_of(flat, model, **options):
  """A state and the jitted step of a model and a checked config."""
  step = build.build_step(flat, flat['num_steps'])
  step = dataclasses.replace(step, model=model, **{'flip': False} | options)
  return first_state(step), jitted(step)


@contextlib.contextmanager
def before_step(number, call):
  """Calls a function before that step of runs."""

  def take(stepper, step, state, real=loop.Stepper.__call__):
    if int(state.step) == number - 1:
      call()
    return real(stepper, step, state)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Stepper, '__call__', take)
    yield


def run_until(config, workdir, number, **options):
  """Trains up to a step, where a signal ends the run."""
  stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  with before_step(number, stop), pytest.raises(SystemExit) as caught:
    loop.train(config, workdir, **options)
  assert caught.value.code == 143
