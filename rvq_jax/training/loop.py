"""The training loop: data, step, evaluation, checkpoints, log."""

import logging
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from rvq_jax.data import loaders, sources
from rvq_jax.data.transforms import to_float, to_uint8
from rvq_jax.evaluation import evaluate, figures, metrics
from rvq_jax.training import settings, sharding, writers
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.optimizer import make_optimizer, make_schedule
from rvq_jax.training.progress import Progress
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_eval_step, make_train_step

MAX_NONFINITE_STREAK = 10
GRID_IMAGES = 8


class StopSignal:
  """Turns SIGTERM and the first SIGINT into a request to stop.

  The loop finishes its step, saves and leaves with the exit code that the
  signal calls for (143, 130). A second SIGINT interrupts at once. Outside the
  main thread, where signals cannot be caught, nothing changes.
  """

  def __init__(self):
    self.exit_code = None
    self._old = {}

  def __enter__(self):
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._request)
    except ValueError:
      pass
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _request(self, number, frame):
    del frame
    if self.exit_code is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.exit_code = 128 + number


class Trainer:
  """One run: everything that `train` needs, built and checked once.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run.

  Raises:
    ValueError: the config is not valid, the data is not there, or a checkpoint
      in workdir was made with another config.
  """

  def __init__(self, config, workdir):
    self.config = settings.check_config(config)
    self.workdir = Path(workdir)
    settings.check_devices(self.config['batch_size'], jax.device_count())
    self.dataset = sources.open_dataset(
      self.config['data.name'],
      split=self.config['data.split'],
      data_dir=self.config['data.data_dir'],
    )
    self.mesh = sharding.data_mesh()
    self.model = settings.build_model(self.config)
    self.loader = self._train_loader()
    self.num_steps = self.config['num_steps'] or (
      self.config['num_epochs'] * self.loader.steps_per_epoch
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
    rows = sharding.by_rows(self.mesh)
    self.init = jax.jit(
      lambda key: create_state(
        self.model,
        optimizer,
        key,
        image_size=config['data.image_size'],
        params_ema=ema > 0,
      ),
      out_shardings=everywhere,
    )
    self.train_step = jax.jit(
      make_train_step(
        self.model,
        optimizer,
        seed=config['seed'],
        flip=config['data.flip'],
        params_ema_decay=ema,
      ),
      in_shardings=(everywhere, rows),
      out_shardings=everywhere,
      donate_argnums=0,
    )
    self.reconstruct = jax.jit(
      lambda variables, images: to_uint8(
        self.model.apply(variables, to_float(images)).reconstruction
      )
    )
    self.eval_step = jax.jit(
      make_eval_step(self.model),
      in_shardings=(everywhere, rows),
      out_shardings=everywhere,
    )

  def start(self, checkpoints: Checkpoints):
    """The state to go on from, the loader set to the batch that follows it."""
    step = checkpoints.latest_step
    key = jax.random.key(self.config['seed'])
    if step is None:
      return self.init(key)
    meta = checkpoints.meta(step)
    settings.check_resume(self.config, meta['config'])
    template = jax.eval_shape(self.init, key)
    everywhere = sharding.replicated(self.mesh)
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      template,
    )
    self.loader.seek(meta['position'])
    return checkpoints.restore(template, step)

  def validate(self, state):
    """Metrics and code counts of the state over the validation split."""
    return evaluate.evaluate_split(
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
      self._samples = next(self._validation_batches())['image'][:GRID_IMAGES]
    images = self.reconstruct(state.eval_variables, self._samples)
    return figures.reconstruction_grid(self._samples, np.asarray(images))


def _interval_scalars(window, schedule, step):
  """Means over the steps since the last report; codes from summed counts."""
  window = jax.device_get(window)
  counts = np.sum([w.pop('counts') for w in window], axis=0, dtype=np.float64)
  scalars = {
    name: float(np.mean([w[name] for w in window])) for name in window[0]
  }
  codes = metrics.code_statistics(counts)
  scalars |= {name: codes[name] for name in ('usage', 'perplexity')}
  scalars['learning_rate'] = float(schedule(step - 1))
  return scalars


def _stop_if_not_finite(state, step, scalars):
  streak = int(state.nonfinite_streak)
  if streak >= MAX_NONFINITE_STREAK:
    raise FloatingPointError(
      f'stopped at step {step}: loss or gradient was not finite for {streak} '
      f'steps in a row (mean loss {scalars["loss"]:.4g}); the state is as it '
      'was before them. Lower config.optimizer.learning_rate or set '
      'config.optimizer.clip_norm'
    )


def train(config, workdir) -> dict[str, float]:
  """Trains a model, or goes on with the run that workdir holds.

  Writes to workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/. An
  interrupted run, started again, ends in the same bits as one that was not.
  The last step is always saved.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run.

  Returns:
    The metrics of the last evaluation on the validation split.

  Raises:
    ValueError: see `Trainer`.
    FloatingPointError: ten steps in a row were not finite.
    SystemExit: a signal asked to stop; the state is saved.
  """
  workdir = Path(workdir)
  trainer = Trainer(config, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with (
    Checkpoints(
      workdir, keep=trainer.config['keep_checkpoints']
    ) as checkpoints,
    StopSignal() as stop,
  ):
    state = trainer.start(checkpoints)
    start = int(state.step)
    (workdir / 'config.json').write_text(settings.to_json(trainer.config))
    _introduce(trainer, state, start)
    writer = writers.MultiWriter(
      [
        writers.JsonlWriter(workdir, start_step=start),
        writers.TensorBoardWriter(workdir, start_step=start),
      ]
      if jax.process_index() == 0
      else []
    )
    progress = Progress(start, trainer.num_steps, trainer.config['batch_size'])
    try:
      result = _run(trainer, state, start, checkpoints, writer, progress, stop)
    finally:
      progress.close()
      writer.close()
      trainer.loader.close()
  if stop.exit_code is not None:
    logging.info('stopped by a signal; the state is saved in %s', workdir)
    sys.exit(stop.exit_code)
  return result


def _introduce(trainer, state, start):
  if jax.process_index():
    return
  if start == 0:
    overview = parameter_overview.get_parameter_overview(
      state.params, include_stats=False
    )
    logging.info('parameters\n%s', overview)
  train = trainer.dataset.train
  logging.info(
    '%s: %d training images, %d steps an epoch; step %d of %d; %d %s',
    trainer.config['data.name'],
    len(train),
    trainer.loader.steps_per_epoch,
    start,
    trainer.num_steps,
    jax.device_count(),
    jax.devices()[0].device_kind,
  )
  if trainer.dataset.note:
    logging.info('%s', trainer.dataset.note)


def _run(trainer, state, start, checkpoints, writer, progress, stop):
  """Steps from `start` to the end of the run or a signal."""
  config, window, result = trainer.config, [], {}

  def save(scores=None):
    checkpoints.save(
      state,
      config=config,
      position=trainer.loader.position(),
      metrics=scores,
    )

  def due(step, every):
    return every and step % every == 0

  for step in range(start + 1, trainer.num_steps + 1):
    batch = sharding.shard_batch(next(trainer.loader), trainer.mesh)
    state, scalars = trainer.train_step(state, batch)
    window.append(scalars)
    progress.advance()
    last = step == trainer.num_steps or stop.exit_code is not None
    if last or due(step, config['log_every']):
      scalars = _interval_scalars(window, trainer.schedule, step)
      window = []
      _stop_if_not_finite(state, step, scalars)
      scalars |= progress.report(step, scalars)
      writer.write_scalars(
        step, {f'train/{name}': value for name, value in scalars.items()}
      )
    scores = None
    if step == trainer.num_steps or due(step, config['eval_every']):
      progress.pause()
      result = scores = _validate(trainer, state, step, writer, progress)
      progress.resume()
    if last or scores or due(step, config['checkpoint_every']):
      save(scores)
    writer.flush()
    if stop.exit_code is not None:
      break
  return result


def _validate(trainer, state, step, writer, progress):
  """Evaluates on the validation split; writes scalars, grid and histogram."""
  result, counts = trainer.validate(state)
  progress.say(
    f'step {step}  validation: mse {result["mse"]:.4f}  psnr '
    f'{result["psnr"]:.2f} dB  usage {result["usage"]:.1%}  perplexity '
    f'{result["perplexity"]:.0f}'
  )
  writer.write_scalars(
    step, {f'validation/{name}': value for name, value in result.items()}
  )
  if jax.process_count() == 1:
    writer.write_images(
      step, {'validation/reconstructions': trainer.reconstruct_samples(state)}
    )
  writer.write_histograms(step, {'validation/code_counts': counts})
  return result
