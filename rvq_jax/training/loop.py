"""The training loop: data, step, evaluation, checkpoints, log."""

import collections
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from rvq_jax import io, metrics, sharding
from rvq_jax.data.datasets import SPLIT_FILE
from rvq_jax.io import explain_full_disk, write_atomic
from rvq_jax.training import config as config_lib
from rvq_jax.training import writers
from rvq_jax.training.checkpoints import Checkpoints, has_checkpoints
from rvq_jax.training.preemption import StopSignal
from rvq_jax.training.run import Run
from rvq_jax.training.step import MAX_NONFINITE_STREAK

MAX_STEPS_IN_FLIGHT = 2


def train(config, workdir, *, init=None) -> dict[str, float]:
  """Trains a model, or resumes the run in workdir.

  Writes config.json, metrics.jsonl, tensorboard/, checkpoints/ and, where it
  divides a folder of images, split.json. A run that was interrupted ends in the
  same bits as one that was not: on CPU, and on GPUs with
  config.deterministic=True.

  Args:
    config: ConfigDict or nested mapping; see configs/cifar10.py.
    workdir: directory of the run.
    init: a function that gives a trained model, as `lambda: load(export)`. A
      new run starts from its params, batch_stats and codebook; step, optimizer
      and discriminator are new. A run with a checkpoint resumes from that.

  Returns:
    The metrics of the last evaluation on the validation split.

  Raises:
    ValueError: the config is not valid or not that of the checkpoint, the model
      of `init` does not fit it, workdir is in use, or no checkpoint in it is
      sound.
    OSError: the disk is full.
    FloatingPointError: ten steps in a row were not finite.
    SystemExit: a signal asked to stop; the state is saved.
    jax.errors.JaxRuntimeError: another process of the run is lost.
  """
  workdir, run = Path(workdir), Run(config, workdir, init)
  config = run.config
  if not has_checkpoints(workdir):
    run.initial  # noqa: B018 - what does not fit ends here, with nothing written
  advice = 'start the same command again: it resumes from the last checkpoint'
  with (
    explain_full_disk(workdir, advice),
    lock(workdir),
    StopSignal() as stop,  # until the last save is complete
    Checkpoints(workdir, keep=config['keep_checkpoints']) as checkpoints,
    contextlib.closing(run.loader),
  ):
    state = run.start(checkpoints)
    start = int(state.step)
    kinds = ()
    if jax.process_index() == 0:
      kinds = (writers.TensorBoardWriter, writers.JsonlWriter)
      write_atomic(workdir / 'config.json', config_lib.to_json(config))
      if not start:
        run.dataset.write_split(workdir / SPLIT_FILE)
      _log_overview(run, state, start)
    writer = writers.MultiWriter(w(workdir, start_step=start) for w in kinds)
    with (
      contextlib.closing(writer),
      writers.Progress(start, run.num_steps, config['batch_size']) as progress,
    ):
      result = _steps(run, state, start, checkpoints, writer, progress, stop)
  if stop.exit_code is not None:
    logging.info(
      'stopped by a signal and saved in %s; the same command resumes', workdir
    )
    sys.exit(stop.exit_code)
  return result


def _steps(run, state, start, checkpoints, writer, progress, stop):
  """Steps from `start` to the end of the run or a signal."""
  config, window, result = run.config, [], {}
  prefetch, phase = Prefetch(run.loader, run.mesh), None
  for step in range(start + 1, run.num_steps + 1):
    due = {
      name: config[f'{name}_every'] and step % config[f'{name}_every'] == 0
      for name in ('log', 'eval', 'checkpoint')
    }
    batch, before = prefetch.next_batch(), phase
    phase = run.quantizes(step), run.judges(step)
    new = phase != before  # each phase is a program of its own
    with progress.compiling() if new else contextlib.nullcontext():
      state, scalars = run.train_step(step, state, batch)
    prefetch.dispatched(scalars['loss'])
    window.append(scalars)
    progress.advance()
    stopping = stop.agreed(ask=due['log'])
    last = step == run.num_steps or stopping
    if last or due['log']:
      window = jax.device_get(window)
      _stop_if_not_finite(state, step, window)
      scalars = _window_scalars(window, run.schedule, step, config['log_every'])
      window = []
      scalars |= progress.report(step, scalars, waited=prefetch.waited())
      writer.write_scalars(step, {f'train/{n}': x for n, x in scalars.items()})
    score = None
    if step == run.num_steps or due['eval']:
      with progress.paused():
        result = _validate(run, state, step, writer, progress)
      score = result.get('mse')  # none before latents are quantized
    wanted = step == run.num_steps or due['eval'] or due['checkpoint']
    # A run that may be diverging must not crowd out its good checkpoints.
    if last or (wanted and not int(state.nonfinite_streak)):
      writer.flush()  # first, so that no checkpoint is ahead of the log
      checkpoints.save(
        state, config=config, position=run.loader.position(), score=score
      )
    if last:  # not stop.exit_code: a signal may have come since it was read
      break
  return result


class Prefetch:
  """Batches on the devices, made while the devices work on earlier steps.

  At most two steps are in flight: their batches take device memory, and a
  signal waits for them.
  """

  def __init__(self, loader, mesh):
    self._loader, self._mesh = loader, mesh
    self._in_flight = collections.deque()
    self._waited = 0.0

  def next_batch(self):
    """The batch of the next step, a tree of global arrays."""
    start = time.monotonic()
    batch = sharding.shard_batch(next(self._loader), self._mesh)
    if not self._in_flight or self._in_flight[-1].is_ready():
      self._waited += time.monotonic() - start  # the devices were idle
    return batch

  def dispatched(self, result: jax.Array) -> None:
    """Waits until at most two steps are in flight, one of them this one's."""
    self._in_flight.append(result)
    if len(self._in_flight) > MAX_STEPS_IN_FLIGHT:
      jax.block_until_ready(self._in_flight.popleft())

  def waited(self) -> float:
    """Seconds without a batch for an idle device since the last call."""
    waited, self._waited = self._waited, 0.0
    return waited


@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Makes a workdir and holds its lock, which the system frees at any end.

  Raises:
    ValueError: another process trains there, or it cannot be made.
  """
  try:
    Path(workdir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'cannot make the folder {workdir}: {error.strerror}; give another '
      '--workdir'
    ) from error
  if jax.process_index():
    yield
    return
  path = Path(workdir) / '.lock'
  with io.lock(path, workdir, 'give another --workdir'):
    yield


def _parameter_table(params) -> str:
  """A line for each kind of block: its name, how many, their parameters."""
  counts = collections.defaultdict(list)
  for module, parts in sorted(params.items()):
    for part, values in parts.items():
      name = f'{module}/{part.rstrip("0123456789")}'
      counts[name].append(parameter_overview.count_parameters({part: values}))
  lines = [f'{sum(sum(c) for c in counts.values()):,} parameters']
  for name, own in counts.items():
    label = name if len(own) == 1 else f'{name} x {len(own)}'
    lines.append(f'  {label:<24}{sum(own):>12,}')
  return '\n'.join(lines)


def _log_overview(run, state, start):
  if start == 0:
    logging.info('%s', _parameter_table(state.params))
  logging.info(
    '%s: %d training images, %d steps per epoch; step %d of %d; %d %s',
    run.config['data.name'],
    len(run.dataset.train),
    run.loader.steps_per_epoch,
    start,
    run.num_steps,
    jax.device_count(),
    jax.devices()[0].device_kind,
  )
  if run.dataset.note:
    logging.info('%s', run.dataset.note)


def _window_scalars(window, schedule, step, log_every):
  """Means over the steps since the last report; codes from summed counts.

  Skipped steps, whose numbers may not be finite, stay out of the means.
  Usage and perplexity of fewer steps than `log_every`, as at the end of a run,
  do not compare with the others' and are left out.
  """
  counts = [w.pop('counts') for w in window]
  counts = [count for count in counts if count is not None]
  taken = [w for w in window if not w['skipped']] or window
  scalars = {
    name: float(np.mean([w[name] for w in taken if name in w]))
    for name in taken[-1]
  }
  scalars['skipped'] = float(np.mean([w['skipped'] for w in window]))
  scalars.pop('usage', None)
  scalars.pop('perplexity', None)
  if len(counts) == log_every:
    codes = metrics.code_statistics(np.sum(counts, axis=0, dtype=np.float64))
    scalars |= {name: codes[name] for name in ('usage', 'perplexity')}
  return scalars | {'learning_rate': float(schedule(step - 1))}


def _stop_if_not_finite(state, step, window):
  streak = int(state.nonfinite_streak)
  if streak < MAX_NONFINITE_STREAK:
    return
  what = 'statistics of BatchNorm, the codebook or the discriminator overflowed'
  for name in ('grad_norm', 'loss'):
    values = [w[name] for w in window if not np.isfinite(w[name])]
    if values:
      what = f'the {name} was {values[0]}'
  first = step - streak + 1
  raise FloatingPointError(
    f'stopped at step {first + MAX_NONFINITE_STREAK - 1}: for '
    f'{MAX_NONFINITE_STREAK} steps in a row, from step {first} on, {what}; the '
    'state is as it was before them, and so is the last checkpoint. Lower '
    'config.optimizer.learning_rate or set config.optimizer.clip_norm'
  )


def _validate(run, state, step, writer, progress):
  """Evaluates on the validation split; writes scalars, grid and histogram."""
  result, counts = run.validate(state)
  if counts is None:
    text = f'autoencoder_mse {result["autoencoder_mse"]:.4f}, not quantized yet'
  else:
    text = (
      f'mse {result["mse"]:.4f}  psnr {result["psnr"]:.2f} dB  usage '
      f'{result["usage"]:.1%}  perplexity {result["perplexity"]:.0f}'
    )
  progress.say(f'step {step}  validation: {text}')
  writer.write_scalars(step, {f'validation/{n}': x for n, x in result.items()})
  samples = run.reconstruct_samples(state)
  writer.write_images(step, {'validation/reconstructions': samples})
  if counts is not None:
    writer.write_histograms(step, {'validation/code_counts': counts})
  return result
