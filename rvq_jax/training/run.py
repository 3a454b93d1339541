"""A run's parts, built from its config."""

import os
from pathlib import Path

import jax
import numpy as np
from jax._src.xla_bridge import backends_are_initialized

from rvq_jax import metrics
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import to_float
from rvq_jax.training import config as config_lib
from rvq_jax.training import sharding
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.optimizer import make_optimizer, make_schedule
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step
from rvq_jax.training.validation import evaluate_split, make_eval_step

GRID_IMAGES = 8
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'


def make_deterministic() -> None:
  """Has XLA compile programs for GPUs without atomics in an unknown order.

  Raises:
    ValueError: JAX has started its backend, and with it read XLA_FLAGS.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if DETERMINISTIC in flags.split():
    return
  if backends_are_initialized():
    raise ValueError(
      'config.deterministic: expected to be set before JAX starts its devices; '
      f'start the process with XLA_FLAGS={DETERMINISTIC}'
    )
  os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC}'.strip()


class Run:
  """Everything that `train` needs, built and checked once.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run, whose split file is used if it exists.

  Attributes:
    config: the checked flat config.
    init: key -> the first state, jitted.
    template: shapes and shardings of the state.
    train_step: (state, {'image': ...}) -> (state, metrics), jitted; donates
      the state.
  """

  def __init__(self, config, workdir=None):
    self.config = config_lib.check_config(config)
    if self.config['deterministic']:
      make_deterministic()
    if workdir is not None:
      _check_apart(self.config['data.name'], workdir)
    config_lib.check_devices(
      self.config['batch_size'],
      jax.device_count(),
      accumulate_steps=self.config['accumulate_steps'],
    )
    self.dataset = datasets.open_dataset(
      self.config['data.name'],
      split=self.config['data.split'],
      data_dir=self.config['data.data_dir'],
      split_file=workdir and Path(workdir) / datasets.SPLIT_FILE,
    )
    self.mesh = sharding.data_mesh()
    self.model = config_lib.build_model(self.config)
    self.loader = self._train_loader()
    self.num_steps = self.config['num_steps'] or (
      self.config['num_epochs'] * self.loader.steps_per_epoch
    )
    self.key = jax.random.key(self.config['seed'])
    self._build_steps()

  def _train_loader(self):
    config, in_memory = self.config, {'auto': 'auto', 'yes': True, 'no': False}
    return loaders.make_train_loader(
      self.dataset.train,
      batch_size=config['batch_size'],
      image_size=config['data.image_size'],
      crop=config['data.crop'],
      crop_scale=(config['data.crop_scale'], 1.0),
      seed=config['seed'],
      in_memory=in_memory[config['data.in_memory']],
      num_workers=config['data.num_workers'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _build_steps(self):
    config, rows = self.config, sharding.by_rows(self.mesh)
    everywhere = sharding.replicated(self.mesh)
    self.schedule = make_schedule(
      config['optimizer.learning_rate'],
      num_steps=self.num_steps,
      warmup_steps=config['optimizer.warmup_steps'],
      schedule=config['optimizer.schedule'],
    )
    optimizer = make_optimizer(
      self.schedule,
      weight_decay=config['optimizer.weight_decay'],
      clip_norm=config['optimizer.clip_norm'],
      freeze_codes=self.model.quantizer.get('freeze', False),
    )

    def init(key):
      return create_state(
        self.model,
        optimizer,
        key,
        image_size=config['data.image_size'],
        batch_size=config['batch_size'] // config['accumulate_steps'],
        params_ema=config['optimizer.params_ema'] > 0,
      )

    # The seed is an argument, so that runs that differ in it alone share one
    # program in the compilation cache.
    def train_step(state, batch, seed):
      return make_train_step(
        self.model,
        optimizer,
        seed=seed,
        flip=config['data.flip'],
        params_ema_decay=config['optimizer.params_ema'],
        accumulate_steps=config['accumulate_steps'],
      )(state, batch)

    def reconstruct(variables, images):
      out = self.model.apply(variables, to_float(images))
      return metrics.to_uint8(out.reconstruction)

    self.init = jax.jit(init, out_shardings=everywhere)
    self.template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(init, self.key),
    )
    step = jax.jit(
      train_step,
      in_shardings=(everywhere, rows, everywhere),
      out_shardings=everywhere,
      donate_argnums=0,
    )
    seed = np.int32(config['seed'])
    self.train_step = lambda state, batch: step(state, batch, seed)
    self.eval_step = jax.jit(
      make_eval_step(self.model),
      in_shardings=(everywhere, rows),
      out_shardings=everywhere,
    )
    self.reconstruct = jax.jit(reconstruct, out_shardings=everywhere)

  def start(self, checkpoints: Checkpoints):
    """The state to start from; the loader is set to the batch after it."""
    found = checkpoints.restore_newest(
      self.template,
      lambda meta: config_lib.check_resume(self.config, meta['config']),
    )
    if found is None:
      return self.init(self.key)
    state, meta = found
    self.loader.seek(meta['position'])
    return state

  def validate(self, state):
    """Metrics and code counts of the state over the validation split."""
    batches = loaders.eval_batches(
      self.dataset.validation,
      batch_size=self.config['batch_size'],
      image_size=self.config['data.image_size'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return evaluate_split(
      self.eval_step, state.eval_variables, batches, mesh=self.mesh
    )

  def reconstruct_samples(self, state) -> np.ndarray:
    """The first validation images above their reconstructions, uint8."""
    # Every process takes part, with the same images.
    first = next(
      loaders.eval_batches(
        self.dataset.validation,
        batch_size=GRID_IMAGES,
        image_size=self.config['data.image_size'],
      )
    )
    samples = first['image'][first['mask']]
    images = self.reconstruct(state.eval_variables, samples)
    return metrics.reconstruction_grid(samples, np.asarray(images))


def _check_apart(name: str, workdir) -> None:
  """Refuses a workdir among the images, whose figures would be read as such."""
  kind, _, folder = name.partition(':')
  if kind == 'folder' and Path(workdir).resolve().is_relative_to(
    Path(folder).resolve()
  ):
    raise ValueError(
      f'expected a --workdir outside of the images in {folder}, got {workdir}'
    )
