"""The training loop: data, step, evaluation, checkpoints, log."""

import logging
import sys
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from rvq_jax import metrics
from rvq_jax.io import explain_full_disk, write_atomic
from rvq_jax.training import config as config_lib
from rvq_jax.training import writers
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.dispatch import dispatch_size
from rvq_jax.training.lock import workdir_lock
from rvq_jax.training.preemption import StopSignal
from rvq_jax.training.progress import Progress
from rvq_jax.training.run import Run
from rvq_jax.training.step import MAX_NONFINITE_STREAK

MAX_CALLS_IN_FLIGHT = 2


def _interval_scalars(window, schedule, step, log_every):
  """Means over the steps since the last report; codes from summed counts.

  The last steps of a run, or the first after a resume, may be fewer: their
  codes do not compare with the other reports', and are left out.
  """
  window = jax.device_get(window)
  counts = np.sum([w.pop('counts') for w in window], axis=0, dtype=np.float64)
  scalars = {
    name: np.concatenate([np.atleast_1d(w[name]) for w in window])
    for name in window[0]
  }
  steps = len(scalars['loss'])
  scalars = {name: float(np.mean(x)) for name, x in scalars.items()}
  codes = metrics.code_statistics(counts)
  for name in ('usage', 'perplexity'):
    del scalars[name]
    if steps == log_every:
      scalars[name] = codes[name]
  scalars['learning_rate'] = float(schedule(step - 1))
  return scalars


def _stop_if_not_finite(state, step, scalars):
  streak = int(state.nonfinite_streak)
  if streak >= MAX_NONFINITE_STREAK:
    first = step - streak + 1
    raise FloatingPointError(
      f'stopped at step {first + MAX_NONFINITE_STREAK - 1}: for '
      f'{MAX_NONFINITE_STREAK} steps in a row, from step {first} on, '
      f'{_not_finite(scalars)}; the state is as it was before them, and so is '
      'the last checkpoint. Lower config.optimizer.learning_rate or set '
      'config.optimizer.clip_norm'
    )


def _not_finite(scalars):
  if not np.isfinite(scalars['loss']):
    return f'the loss was {scalars["loss"]}'
  if not np.isfinite(scalars['grad_norm']):
    return f'the norm of the gradient was {scalars["grad_norm"]}'
  return 'the running statistics of BatchNorm or the codebook overflowed'


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
    ValueError: see `Run`; or another process trains in workdir; or no
      checkpoint in it is intact.
    OSError: there is no room for a checkpoint.
    FloatingPointError: ten steps in a row were not finite.
    SystemExit: a signal asked to stop; the state is saved.
    jax.errors.JaxRuntimeError: another process of the run is gone.
  """
  workdir = Path(workdir)
  run = Run(config, workdir)
  with (
    explain_full_disk(
      workdir,
      'start the same command again: it resumes from the last complete '
      'checkpoint',
    ),
    workdir_lock(workdir),
    StopSignal() as stop,  # until the last save is complete
    Checkpoints(workdir, keep=run.config['keep_checkpoints']) as checkpoints,
  ):
    state = run.start(checkpoints)
    start = int(state.step)
    if jax.process_index() == 0:
      write_atomic(workdir / 'config.json', config_lib.to_json(run.config))
    _introduce(run, state, start)
    writer = writers.MultiWriter(
      [
        writers.JsonlWriter(workdir, start_step=start),
        writers.TensorBoardWriter(workdir, start_step=start),
      ]
      if jax.process_index() == 0
      else []
    )
    progress = Progress(start, run.num_steps, run.config['batch_size'])
    try:
      result = _run(run, state, start, checkpoints, writer, progress, stop)
    finally:
      progress.close()
      writer.close()
      run.loader.close()
  if stop.exit_code is not None:
    logging.info('stopped by a signal; the state is saved in %s', workdir)
    sys.exit(stop.exit_code)
  return result


def _introduce(run, state, start):
  if jax.process_index():
    return
  if start == 0:
    overview = parameter_overview.get_parameter_overview(
      state.params, include_stats=False
    )
    logging.info('parameters\n%s', overview)
  train = run.dataset.train
  logging.info(
    '%s: %d training images, %d steps an epoch; step %d of %d; %d %s',
    run.config['data.name'],
    len(train),
    run.loader.steps_per_epoch,
    start,
    run.num_steps,
    jax.device_count(),
    jax.devices()[0].device_kind,
  )
  if run.dataset.note:
    logging.info('%s', run.dataset.note)


def _run(run, state, start, checkpoints, writer, progress, stop):
  """Steps from `start` to the end of the run or a signal."""
  config, window, result = run.config, [], {}

  def save(scores=None):
    checkpoints.save(
      state,
      config=config,
      position=run.loader.position(),
      metrics=scores,
    )

  intervals = [
    config[f'{name}_every'] for name in ('log', 'eval', 'checkpoint')
  ]

  def due(step, every):
    return every and step % every == 0

  step = start
  while step < run.num_steps:
    count = dispatch_size(
      step, config['steps_per_dispatch'], run.num_steps, *intervals
    )
    busy = window[-1]['loss'] if window else None
    batch = run.feed.next(count, busy)
    take = run.train_step if count == 1 else run.train_steps
    state, scalars = take(state, batch)
    step += count
    window.append(scalars)
    # The host prepares the next steps while the device works, but not without
    # end: batches wait on the device, and a signal waits for the steps.
    if len(window) > MAX_CALLS_IN_FLIGHT:
      jax.block_until_ready(window[-1 - MAX_CALLS_IN_FLIGHT])
    progress.advance(count)
    stopping = stop.agreed(ask=due(step, config['log_every']))
    last = step == run.num_steps or stopping
    if last or due(step, config['log_every']):
      scalars = _interval_scalars(
        window, run.schedule, step, config['log_every']
      )
      window = []
      _stop_if_not_finite(state, step, scalars)
      scalars |= progress.report(step, scalars, waited=run.feed.waited())
      writer.write_scalars(
        step, {f'train/{name}': value for name, value in scalars.items()}
      )
    scores = None
    if step == run.num_steps or due(step, config['eval_every']):
      progress.pause()
      result = scores = _validate(run, state, step, writer, progress)
      progress.resume()
    wanted = scores or due(step, config['checkpoint_every'])
    # A run that may be diverging must not crowd out its good checkpoints.
    if last or (wanted and not int(state.nonfinite_streak)):
      writer.flush()  # first, so that no checkpoint is ahead of the log
      save(scores)
    if last:  # not stop.exit_code: a signal may have come since it was read
      break
  return result


def _validate(run, state, step, writer, progress):
  """Evaluates on the validation split; writes scalars, grid and histogram."""
  result, counts = run.validate(state)
  progress.say(
    f'step {step}  validation: mse {result["mse"]:.4f}  psnr '
    f'{result["psnr"]:.2f} dB  usage {result["usage"]:.1%}  perplexity '
    f'{result["perplexity"]:.0f}'
  )
  writer.write_scalars(
    step, {f'validation/{name}': value for name, value in result.items()}
  )
  writer.write_images(
    step, {'validation/reconstructions': run.reconstruct_samples(state)}
  )
  writer.write_histograms(step, {'validation/code_counts': counts})
  return result
