"""The training loop: data, step, evaluation, checkpoints, log."""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from rvq_jax import io, metrics, sharding
from rvq_jax.data.datasets import SPLIT_FILE, check_apart
from rvq_jax.training import build, validation, writers
from rvq_jax.training import config as config_lib
from rvq_jax.training.backend import make_deterministic
from rvq_jax.training.checkpoints import Checkpoints, has_checkpoints, is_run
from rvq_jax.training.preemption import StopSignal
from rvq_jax.training.state import parameter_table
from rvq_jax.training.step import MAX_SKIPPED, compile_init, compile_step


def train(config, workdir, *, init=None) -> dict[str, float]:
  """Trains a model, or resumes the run in workdir.

  Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and, for a
  folder of images, split.json. An interrupted run ends in the same bits as an
  uninterrupted one: on CPU, and on GPUs with config.deterministic=True.

  Args:
    config: ConfigDict or nested mapping; see rvq_jax.configs.cifar10.
    workdir: directory of the run.
    init: a function that returns a trained model, as `lambda: load(export)`. A
      run without checkpoints starts from its params, batch_stats and codebook.

  Returns:
    The metrics of the last evaluation on the validation split.

  Raises:
    ValueError: the config is invalid or not the checkpoint's, the model of
      `init` does not fit it, workdir is in use or holds something other than a
      run, or no checkpoint is sound.
    OSError: the disk is full.
    FloatingPointError: ten steps in a row were not finite.
    SystemExit: a signal stopped the run; the state is saved.
    jax.errors.JaxRuntimeError: another process of the run is lost.
  """
  config, workdir = config_lib.check_config(config), Path(workdir)
  if config['deterministic']:
    make_deterministic()
  check_apart(config['data.name'], workdir)
  config_lib.check_devices(config, jax.device_count())
  advice = 'start the same command again: it resumes from the last checkpoint'
  # The lock comes before the images, which may take minutes to decode.
  with io.explain_full_disk(workdir, advice), lock(workdir):
    return _train(config, workdir, init)


def _train(config, workdir, init):
  mesh = sharding.data_mesh()
  begun = has_checkpoints(workdir)
  dataset, loader = build.build_data(config, workdir if begun else None)
  # build_data has compared the images, so their folder may have moved.
  recorded = begun and dataset.names and (workdir / SPLIT_FILE).exists()
  epochs = config['num_epochs'] * loader.steps_per_epoch
  step = build.build_step(config, config['num_steps'] or epochs)
  num_steps = step.objective.num_steps
  take = Stepper(loader, mesh, step.objective.load_lpips(mesh))
  sizes = config['data.image_size'], config['batch_size']
  first_state = compile_init(step, mesh, *sizes)
  key, variables = jax.random.key(config['seed']), None
  template = first_state.eval_shape(key)
  if begun:
    if init:
      logging.info('--init is ignored: %s resumes its own run', workdir)
  else:
    variables = build.build_start(config, init, template)
  with (
    StopSignal() as stop,  # until the last save is complete
    Checkpoints(workdir, keep=config['keep_checkpoints']) as checkpoints,
    contextlib.closing(loader),
  ):
    restored = checkpoints.restore_newest(
      template,
      lambda meta: config_lib.check_resume(
        config, meta['config'], same_images=bool(recorded)
      ),
    )
    if restored:
      state, meta = restored
      loader.seek(meta['position'])
      objective = step.objective.resumed(state.discriminator)
      step = dataclasses.replace(step, objective=objective)
    else:
      state = first_state(key, variables)
    start, kinds = int(state.step), ()
    if jax.process_index() == 0:
      kinds = (writers.TensorBoardWriter, writers.JsonlWriter)
      io.write_atomic(workdir / 'config.json', config_lib.to_json(config))
      if not start:
        dataset.write_split(workdir / SPLIT_FILE)
      _log_overview(dataset, state, loader.steps_per_epoch, num_steps)
    writer = writers.MultiWriter(w(workdir, start_step=start) for w in kinds)
    progress = writers.Progress(start, num_steps, config['batch_size'])
    with contextlib.closing(writer), progress:
      split = validation.Split(
        dataset.validation, image_size=sizes[0], batch_size=sizes[1]
      )
      validate = functools.partial(_validate, split, mesh, writer, progress)
      saving = writer, progress, checkpoints, stop
      result = _steps(config, num_steps, step, state, take, validate, *saving)
  if stop.exit_code is not None:
    logging.info(
      'stopped by a signal and saved in %s; the same command resumes', workdir
    )
    sys.exit(stop.exit_code)
  return result


def _steps(
  config,
  num_steps,
  step,
  state,
  take,
  validate,
  writer,
  progress,
  checkpoints,
  stop,
):
  """Steps from `state.step` to the end of the run or a signal."""
  late = config['model.quantize_after']
  schedule = jax.jit(build.build_schedule(config, num_steps))
  intervals = [
    config[f'{name}_every'] for name in ('log', 'eval', 'checkpoint')
  ]
  phase, window, result = None, [], {}
  for i in range(int(state.step) + 1, num_steps + 1):
    log, evaluate, save = (n and i % n == 0 for n in intervals)
    before, phase = phase, step.phase(i, quantize_after=late)
    new = phase != before  # each phase is a program of its own
    with progress.compiling() if new else contextlib.nullcontext():
      state, scalars = take(phase, state)
    window.append(scalars)
    progress.advance()
    last = stop.agreed(ask=log) or i == num_steps
    if last or log:
      window = jax.device_get(window)
      _stop_if_not_finite(state, i, window)
      scalars = _window_scalars(window, schedule, i, config['log_every'])
      scalars |= progress.report(i, scalars, waited=take.waited)
      writer.write_scalars(i, {f'train/{n}': x for n, x in scalars.items()})
      window, take.waited = [], 0.0
    score = None
    if evaluate or i == num_steps:
      with progress.paused():
        result = validate(phase, state)
      score, save = result.get('mse'), True  # no mse before quantization
    # A run that may be diverging must not crowd out its good checkpoints.
    if last or (save and not int(state.nonfinite_streak)):
      writer.flush()  # first, so that no checkpoint is ahead of the log
      position = take.position()
      checkpoints.save(state, config=config, position=position, score=score)
    if last:  # not stop.exit_code: a signal may have come since
      break
  return result


class Stepper:
  """Takes steps; makes each batch while the devices work on earlier steps.

  At most two steps are in flight: a signal waits for them, and their batches
  take device memory. `waited` counts the seconds, since it was set to 0, in
  which the devices were idle for lack of a batch.
  """

  def __init__(self, loader, mesh, lpips_weights=None):
    self._loader, self._mesh, self._take = loader, mesh, compile_step(mesh)
    self._lpips_weights, self.position = lpips_weights, loader.position
    self._in_flight, self.waited = [], 0.0

  def __call__(self, step, state):
    """The next state and metrics, once at most two steps are in flight."""
    start = time.monotonic()
    batch = sharding.shard_batch(next(self._loader), self._mesh)
    if not self._in_flight or self._in_flight[-1].is_ready():
      self.waited += time.monotonic() - start  # the devices were idle
    state, scalars = self._take(step, state, batch, self._lpips_weights)
    self._in_flight.append(scalars['loss'])
    if len(self._in_flight) > 2:
      jax.block_until_ready(self._in_flight.pop(0))
    return state, scalars


@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Makes a workdir and holds its lock; removes it if nothing was written.

  ValueError: the folder holds something other than a run, is not writable, or
  another process trains there.
  """
  if jax.process_index():  # the first one does it for all
    yield
    return
  io.utf8_path(workdir)
  io.check_folder(workdir, '--workdir', is_run)
  workdir = Path(workdir)
  new = [p for p in (workdir, *workdir.parents) if not p.exists()]
  path = workdir / '.lock'
  with io.lock(path, workdir, 'give another --workdir'):
    try:
      yield
    finally:
      with contextlib.suppress(OSError):  # a parent that others use
        if new and os.listdir(workdir) == [path.name]:
          path.unlink()
          for folder in new:
            folder.rmdir()


def _log_overview(dataset, state, epoch, num_steps):
  if not state.step:
    logging.info('%s', parameter_table(state.params))
  logging.info(
    '%s: %d training images, %d steps per epoch; step %d of %d; %d %s',
    *(dataset.name, len(dataset.train), epoch, int(state.step), num_steps),
    *(jax.device_count(), jax.devices()[0].device_kind),
  )
  if dataset.note:
    logging.info('%s', dataset.note)


def _window_scalars(window, schedule, step, log_every):
  """Means over the steps since the last report; codes from summed counts.

  The means leave out skipped steps, whose numbers may not be finite. Usage and
  perplexity need `log_every` steps, to be comparable with earlier lines.
  """
  counts = [c for c in (w.pop('counts') for w in window) if c is not None]
  taken = [w for w in window if not w['skipped']] or window
  names = [n for n in taken[-1] if n not in ('usage', 'perplexity')]
  scalars = {n: float(np.mean([w[n] for w in taken if n in w])) for n in names}
  scalars['skipped'] = float(np.mean([w['skipped'] for w in window]))
  if len(counts) == log_every:
    codes = metrics.code_statistics(np.sum(counts, axis=0, dtype=np.float64))
    scalars |= {name: codes[name] for name in ('usage', 'perplexity')}
  return scalars | {'learning_rate': float(schedule(step - 1))}


def _stop_if_not_finite(state, step, window):
  streak = int(state.nonfinite_streak)
  if streak < MAX_SKIPPED:
    return
  why = 'statistics of BatchNorm, the codebook or the discriminator overflowed'
  for name in ('grad_norm', 'loss'):
    if values := [w[name] for w in window if not np.isfinite(w[name])]:
      why = f'the {name} was {values[0]}'
  first = step - streak + 1
  raise FloatingPointError(
    f'stopped at step {first + MAX_SKIPPED - 1}: for {MAX_SKIPPED} steps in a '
    f'row, from step {first} on, {why}; these steps changed neither the state '
    'nor a checkpoint: lower config.optimizer.learning_rate or set '
    'config.optimizer.clip_norm'
  )


def _validate(split, mesh, writer, progress, step, state):
  """Evaluates on the validation split; writes scalars, grid and histogram."""
  i = int(state.step)
  result, counts, grid = validation.validate(
    *(step.model, state.eval_variables, split),
    mesh=mesh,
    quantize=step.quantize,
  )
  if counts is None:
    text = f'autoencoder_mse {result["autoencoder_mse"]:.4f}, not quantized yet'
  else:
    text = (
      f'mse {result["mse"]:.4f}  psnr {result["psnr"]:.2f} dB  usage '
      f'{result["usage"]:.1%}  perplexity {result["perplexity"]:.0f}'
    )
    writer.write_histograms(i, {'validation/code_counts': counts})
  progress.say(f'step {i}  validation: {text}')
  writer.write_scalars(i, {f'validation/{n}': x for n, x in result.items()})
  writer.write_images(i, {'validation/reconstructions': grid})
  return result
