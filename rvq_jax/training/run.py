"""A run's parts, built from its config."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax import metrics
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import to_float
from rvq_jax.metrics import to_uint8
from rvq_jax.training import config as config_lib
from rvq_jax.training import dispatch, machine, memory, sharding
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.optimizer import make_optimizer, make_schedule
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step
from rvq_jax.training.validation import evaluate_split, make_eval_step

GRID_IMAGES = 8


def _size(tree) -> int:
  """Bytes of the arrays of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Run:
  """One run: everything that `train` needs, built and checked once.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run.

  Raises:
    ValueError: the config is not valid, the data is not there, or a checkpoint
      in workdir was made with another config.
  """

  def __init__(self, config, workdir):
    self.config = config_lib.check_config(config)
    self.workdir = Path(workdir)
    config_lib.check_devices(
      self.config['batch_size'],
      jax.device_count(),
      accumulate_steps=self.config['accumulate_steps'],
      codebook_shards=self.config['codebook_shards'],
    )
    self.dataset = datasets.open_dataset(
      self.config['data.name'],
      split=self.config['data.split'],
      data_dir=self.config['data.data_dir'],
    )
    self.mesh = sharding.data_mesh(
      codebook_shards=self.config['codebook_shards']
    )
    self.model = config_lib.build_model(self.config, mesh=self.mesh)
    self.loader = self._train_loader()
    self.num_steps = self.config['num_steps'] or (
      self.config['num_epochs'] * self.loader.steps_per_epoch
    )
    self.feed = dispatch.Feed(
      self.loader, self.mesh, on_device=self.config['data.on_device']
    )
    self._samples = None
    self._build_steps()

  def _train_loader(self):
    data = self.config
    in_memory = {'auto': 'auto', 'yes': True, 'no': False}
    return loaders.make_train_loader(
      self.dataset.train,
      batch_size=data['batch_size'],
      image_size=data['data.image_size'],
      crop=data['data.crop'],
      crop_scale=(data['data.crop_scale'], 1.0),
      seed=data['seed'],
      in_memory=in_memory[data['data.in_memory']],
      num_workers=data['data.num_workers'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _build_steps(self):
    config = self.config
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
    )
    ema = config['optimizer.params_ema']
    everywhere = sharding.replicated(self.mesh)

    def init(key):
      return create_state(
        self.model,
        optimizer,
        key,
        image_size=config['data.image_size'],
        params_ema=ema > 0,
      )

    self.key = jax.random.key(config['seed'])
    shapes = jax.eval_shape(init, self.key)
    of_state = sharding.of_state(shapes, self.mesh)
    self.template = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      shapes,
      of_state,
    )
    self.state_bytes = _size(shapes)
    codebook = _size(shapes.codebook)
    memory.check_state(
      self.state_bytes
      + _size(shapes.params)  # the gradients
      - codebook
      + codebook // config['codebook_shards']
    )
    self.init = jax.jit(init, out_shardings=of_state)
    self._build_train_steps(optimizer, of_state)
    self.reconstruct = jax.jit(
      lambda variables, images: to_uint8(
        self.model.apply(variables, to_float(images)).reconstruction
      ),
      out_shardings=everywhere,
    )
    self.eval_step = jax.jit(
      make_eval_step(self.model),
      in_shardings=(
        of_state.eval_variables,
        sharding.by_rows(self.mesh),
      ),
      out_shardings=everywhere,
    )

  def _build_train_steps(self, optimizer, of_state):
    config, images = self.config, self.feed.images
    everywhere = sharding.replicated(self.mesh)

    # The seed is an argument, so that runs that differ in it alone share one
    # program in the compilation cache; so are images, which are no constant.
    def one_step(seed, images):
      train_step = make_train_step(
        self.model,
        optimizer,
        seed=seed,
        flip=config['data.flip'],
        params_ema_decay=config['optimizer.params_ema'],
        accumulate_steps=config['accumulate_steps'],
      )
      if images is None:
        return train_step
      return lambda state, batch: train_step(
        state, {'image': jnp.take(images, batch['row'], axis=0)}
      )

    def compiled(of_step, axis):
      step = jax.jit(
        lambda state, batch, seed, images: of_step(one_step(seed, images))(
          state, batch
        ),
        in_shardings=(
          of_state,
          sharding.by_rows(self.mesh, axis=axis),
          everywhere,
          everywhere,
        ),
        out_shardings=(of_state, everywhere),
        donate_argnums=0,
      )
      seed = np.int32(config['seed'])
      return lambda state, batch: step(state, batch, seed, images)

    self.train_step = compiled(lambda step: step, 0)
    self.train_steps = compiled(dispatch.scan_steps, 1)

  def start(self, checkpoints: Checkpoints):
    """The state to go on from, the loader set to the batch that follows it."""
    step = checkpoints.latest_step
    if step is None:
      return self.init(self.key)
    meta = checkpoints.meta(step)
    config_lib.check_resume(self.config, meta['config'])
    machine.check_machine(meta['machine'], exact=self.config['exact_resume'])
    self.loader.seek(meta['position'])
    return checkpoints.restore(self.template, step)

  def validate(self, state):
    """Metrics and code counts of the state over the validation split."""
    return evaluate_split(
      self.eval_step,
      state.eval_variables,
      self._validation_batches(),
      mesh=self.mesh,
    )

  def _validation_batches(self):
    return loaders.eval_batches(
      self.dataset.validation,
      batch_size=self.config['batch_size'],
      image_size=self.config['data.image_size'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def reconstruct_samples(self, state) -> np.ndarray:
    """The first validation images above their reconstructions, uint8."""
    if self._samples is None:
      # Every process takes part, with the same images.
      first = next(
        loaders.eval_batches(
          self.dataset.validation,
          batch_size=GRID_IMAGES,
          image_size=self.config['data.image_size'],
        )
      )
      self._samples = first['image'][first['mask']]
    images = self.reconstruct(state.eval_variables, self._samples)
    return metrics.reconstruction_grid(self._samples, np.asarray(images))
