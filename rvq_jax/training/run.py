"""A run's parts, built from its config."""

import functools
from pathlib import Path

import jax
import numpy as np

from rvq_jax import metrics, sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import to_float
from rvq_jax.training import config as config_lib
from rvq_jax.training import initial
from rvq_jax.training.backend import make_deterministic
from rvq_jax.training.build import build_model
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.objective import Objective
from rvq_jax.training.optimizer import make_optimizer, make_schedule
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step
from rvq_jax.training.validation import (
  autoencoder_error,
  evaluate_split,
  make_autoencoder_step,
  make_eval_step,
)

GRID_IMAGES = 8
RUNS_ONCE = {'xla_backend_optimization_level': 1}
"""Compiles in a third of the time, to the same bits on CPU (docs/scale.md)."""


class Run:
  """Everything that `train` needs, built and checked once.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run, whose split file is used if it exists.
    init: gives the trained model that a new run starts from; see `train`.

  Attributes:
    config: the checked flat config.
    init: key, variables or None -> the first state, jitted.
    objective: the losses other than the quantizer's.
    lpips_weights: on all devices, or None.
    template: shapes and shardings of the state.
    train_step: (step, state, {'image': ...}) -> (state, metrics), jitted;
      step counts from 1, and the state is donated.
  """

  def __init__(self, config, workdir=None, init=None):
    self._init = init
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
    self.model = build_model(self.config)
    self.loader = self._train_loader()
    self.num_steps = self.config['num_steps'] or (
      self.config['num_epochs'] * self.loader.steps_per_epoch
    )
    if self.config['model.quantize_after'] >= self.num_steps:
      raise ValueError(
        f'config.model.quantize_after: expected less than the {self.num_steps} '
        f'steps of the run, got {self.config["model.quantize_after"]}; with 0 '
        'all steps quantize'
      )
    self.objective = self._objective()
    self.lpips_weights = None
    if self.objective.perceptual_weight:
      from rvq_jax.models import lpips_weights

      self.lpips_weights = sharding.replicate(lpips_weights.load(), self.mesh)
    self.key = jax.random.key(self.config['seed'])
    self._build_steps()

  def _objective(self) -> Objective:
    objective = Objective.from_config(
      self.config, num_steps=self.num_steps, dtype=self.model.decoder.dtype
    )
    late = self.config['model.quantize_after']
    if objective.adversarial_weight and late > objective.discriminator_start:
      raise ValueError(
        'config.model.quantize_after: expected at most '
        f'{objective.discriminator_start}, the steps before the discriminator '
        f'learns to tell quantized images from real ones, got {late}'
      )
    return objective

  def _train_loader(self):
    config = self.config
    return loaders.make_train_loader(
      self.dataset.train,
      batch_size=config['batch_size'],
      image_size=config['data.image_size'],
      crop=config['data.crop'],
      crop_scale=(config['data.crop_scale'], 1.0),
      seed=config['seed'],
      num_workers=config['data.num_workers'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _build_steps(self):
    config, rows = self.config, sharding.by_rows(self.mesh)
    everywhere = sharding.replicated(self.mesh)
    schedule = make_schedule(
      config['optimizer.learning_rate'],
      num_steps=self.num_steps,
      warmup_steps=config['optimizer.warmup_steps'],
      schedule=config['optimizer.schedule'],
    )
    self.schedule = jax.jit(schedule)
    optimizer = make_optimizer(
      schedule,
      weight_decay=config['optimizer.weight_decay'],
      clip_norm=config['optimizer.clip_norm'],
      b2=config['optimizer.b2'],
      freeze=config['freeze'],
    )

    def init(key, variables=None):
      state = create_state(
        self.model,
        optimizer,
        key,
        image_size=config['data.image_size'],
        batch_size=config['batch_size'] // config['accumulate_steps'],
        params_ema=config['optimizer.params_ema'] > 0,
        discriminator=self.objective.init_discriminator(
          jax.random.fold_in(key, 1), config['data.image_size']
        ),
      )
      return initial.start_from(state, variables) if variables else state

    # The seed is an argument, so that runs that differ in it alone share one
    # program in the compilation cache; the weights of LPIPS, so that no program
    # holds a copy.
    def train_step(state, batch, seed, lpips_weights, quantize, adversarial):
      return make_train_step(
        self.model,
        optimizer,
        seed=seed,
        flip=config['data.flip'],
        colors=config['data.colors'],
        params_ema_decay=config['optimizer.params_ema'],
        accumulate_steps=config['accumulate_steps'],
        quantize=quantize,
        objective=self.objective,
        adversarial=adversarial,
      )(state, batch, lpips_weights)

    def reconstruct(variables, images, quantize):
      images = to_float(images)
      out = self.model.apply(variables, images, quantize=quantize)
      return metrics.to_uint8(out.reconstruction)

    self.init = jax.jit(
      init, out_shardings=everywhere, compiler_options=RUNS_ONCE
    )
    self.template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(init, self.key),
    )
    step = jax.jit(
      train_step,
      in_shardings=(everywhere, rows, everywhere, everywhere),
      out_shardings=everywhere,
      static_argnums=(4, 5),
      donate_argnums=0,
    )
    seed = np.int32(config['seed'])
    self.train_step = lambda i, state, batch: step(
      *(state, batch, seed, self.lpips_weights),
      *(self.quantizes(i), self.judges(i)),
    )
    self.eval_step, self.autoencoder_step = (
      jax.jit(
        make(self.model),
        in_shardings=(everywhere, rows),
        out_shardings=everywhere,
      )
      for make in (make_eval_step, make_autoencoder_step)
    )
    self.reconstruct = jax.jit(
      reconstruct, static_argnums=2, out_shardings=everywhere
    )

  def quantizes(self, step: int) -> bool:
    """Whether step number `step`, from 1, quantizes the latents."""
    return step > self.config['model.quantize_after']

  def judges(self, step: int) -> bool:
    """Whether step number `step`, from 1, updates the discriminator."""
    own = self.objective
    return own.adversarial_weight > 0 and step > own.discriminator_start

  @functools.cached_property
  def initial(self):
    """The collections that a new run starts from; None: random ones."""
    return initial.collections(self._init, self.template, self.config)

  def start(self, checkpoints: Checkpoints):
    """The state to start from; the loader is set to the batch after it."""
    found = checkpoints.restore_newest(
      self.template,
      lambda meta: config_lib.check_resume(self.config, meta['config']),
    )
    if found is None:
      return self.init(self.key, self.initial)
    state, meta = found
    self.loader.seek(meta['position'])
    return state

  def validate(self, state):
    """Metrics and code counts of the state over the validation split.

    Before latents are quantized: autoencoder_mse alone, and None.
    """
    batches = loaders.eval_batches(
      self.dataset.validation,
      batch_size=self.config['batch_size'],
      image_size=self.config['data.image_size'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    variables = state.eval_variables
    if not self.quantizes(int(state.step)):
      step = self.autoencoder_step
      return autoencoder_error(step, variables, batches, mesh=self.mesh), None
    return evaluate_split(self.eval_step, variables, batches, mesh=self.mesh)

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
    images = self.reconstruct(
      state.eval_variables, samples, self.quantizes(int(state.step))
    )
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
