"""What a run reports: metric files, TensorBoard events, progress.

The writers have the method names of `clu.metric_writers`, whose own writers
import TensorFlow.
"""

import contextlib
import errno
import itertools
import json
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rvq_jax.io import write_atomic


class JsonlWriter:
  """Appends one JSON object per call to WORKDIR/metrics.jsonl.

  Args:
    workdir: directory of the run.
    start_step: lines of later steps, left by a run that was cut off after its
      last checkpoint, are dropped.
  """

  def __init__(self, workdir, *, start_step: int = 0):
    path = Path(workdir) / 'metrics.jsonl'
    if path.exists():
      kept = [line for line in read_jsonl(path) if line['step'] <= start_step]
      write_atomic(path, ''.join(json.dumps(line) + '\n' for line in kept))
    self._file = open(path, 'a')  # noqa: SIM115 - closed by close()
    self.flush, self.close = self._file.flush, self._file.close

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}; a number that is not finite becomes null."""
    values = {name: float(value) for name, value in scalars.items()}
    values = {n: x if math.isfinite(x) else None for n, x in values.items()}
    self._file.write(json.dumps({'step': int(step)} | values) + '\n')


class TensorBoardWriter:
  """Writes TensorBoard events to WORKDIR/tensorboard.

  Args:
    workdir: directory of the run.
    start_step: events of later steps are marked as superseded.
  """

  def __init__(self, workdir, *, start_step: int = 0):
    import tensorboardX  # half a second; only runs that train need it

    self._folder = Path(workdir) / 'tensorboard'
    self._writer = tensorboardX.SummaryWriter(
      str(self._folder), purge_step=start_step + 1
    )
    self._events = self._writer.file_writer.event_writer

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}."""
    self._add(self._writer.add_scalar, step, scalars)

  def write_images(self, step: int, images) -> None:
    """Writes {name: uint8 [h, w, 3]}."""
    self._add(self._writer.add_image, step, images, dataformats='HWC')

  def write_histograms(self, step: int, arrays) -> None:
    """Writes {name: array [n]}."""
    self._add(self._writer.add_histogram, step, arrays)

  def flush(self) -> None:
    """Hands what was written to the operating system."""
    self._check()
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes the file, unless it could not be written."""
    try:
      if self._events._worker.is_alive():
        self._writer.close()
    finally:
      self._events._closed = True  # else tensorboardX tries again at exit

  def _add(self, add, step, values, **options):
    self._check()
    for name, value in values.items():
      add(name, value, step, **options)

  def _check(self):
    # tensorboardX's thread ends at its first error; whoever hands it more
    # events then waits forever.
    if not self._events._worker.is_alive():
      self._events._event_queue.cancel_join_thread()
      full = shutil.disk_usage(self._folder).free < 2**20
      raise OSError(
        errno.ENOSPC if full else errno.EIO,
        'TensorBoard events could not be written',
        str(self._folder),
      )


class MultiWriter:
  """Sends every call to each of several writers that know it."""

  def __init__(self, writers):
    self._writers = tuple(writers)

  def __getattr__(self, method):
    def call_each(*arguments):
      for writer in self._writers:
        if hasattr(writer, method):
          getattr(writer, method)(*arguments)

    return call_each


def read_jsonl(path) -> list[dict]:
  """The lines of a metrics file.

  A line that is no JSON object with an integer 'step' is left out, with one
  warning for all of them, but for a last line that was cut off.
  """
  *lines, last = Path(path).read_text('utf-8', 'replace').split('\n')
  records = [_parsed(line) for line in lines]
  if damaged := records.count(None):
    first = records.index(None) + 1
    logging.warning(
      '%s: left out %d damaged lines, the first is line %d',
      path,
      damaged,
      first,
    )
  return [record for record in [*records, _parsed(last)] if record is not None]


def _parsed(line: str) -> dict | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  step = record.get('step') if isinstance(record, dict) else None
  return record if type(step) is int else None


def shows_bars() -> bool:
  """Whether standard error is a terminal or a notebook's."""
  return sys.stderr.isatty() or 'ipykernel' in sys.modules


def logs_above_bars() -> contextlib.AbstractContextManager:
  """While it is open, what is logged goes above tqdm's bars, not into them."""
  if shows_bars():
    return logging_redirect_tqdm()
  return contextlib.nullcontext()


class Progress:
  """Reports the steps of a run: a bar on a terminal or in a notebook, or lines.

  Use as a context manager.
  """

  def __init__(self, start: int, num_steps: int, batch_size: int):
    self._num_steps, self._batch_size = num_steps, batch_size
    self._step, self._since = start, time.monotonic()
    self._logs = logs_above_bars()
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=start,
      unit='step',
      dynamic_ncols=True,
      disable=not shows_bars(),
      bar_format='{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} '
      '[{elapsed}<{remaining}]{postfix}',
    )

  def __enter__(self):
    self._logs.__enter__()
    return self

  def __exit__(self, *error):
    self._bar.close()
    self._logs.__exit__(*error)

  def advance(self) -> None:
    """A step was handed to the devices."""
    self._bar.update()

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Says so while a step is compiled: a spinner, or a line."""
    with self.paused(), self._spinning():
      yield

  @contextlib.contextmanager
  def _spinning(self):
    if self._bar.disable:
      logging.info('compiling the train step')
      yield
      return
    done = threading.Event()

    def spin():
      for mark in itertools.cycle('|/-\\'):
        self._bar.set_description_str(f'compiling the train step {mark} ')
        if done.wait(0.2):
          return

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()
      self._bar.set_description_str('')

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here is not training."""
    start = time.monotonic()
    yield
    self._since += time.monotonic() - start

  def report(
    self, step: int, scalars: dict[str, float], *, waited: float = 0.0
  ) -> dict[str, float]:
    """Shows the means of scalars over the steps since the last report.

    Args:
      step: steps taken.
      scalars: name -> mean.
      waited: seconds in which the devices had no data.

    Returns:
      images_per_second, and data_wait: the share of the time that was waited.
    """
    now = time.monotonic()
    seconds = max(now - self._since, 1e-9)
    per_step = seconds / max(step - self._step, 1)
    self._step, self._since = step, now
    speed, wait = self._batch_size / per_step, min(waited / seconds, 1.0)
    names = ('loss', 'mse', 'lpips', 'discriminator_loss')
    parts = [f'{n} {scalars[n]:.4f}' for n in names if n in scalars]
    if 'usage' in scalars:
      parts.append(f'usage {scalars["usage"]:.1%}')
      parts.append(f'perplexity {scalars["perplexity"]:.0f}')
    parts.append(f'{speed:.0f} images/s')
    if wait > 0.05:
      parts[-1] += f' ({wait:.0%} waiting for data)'
    # The bar has less room than a line.
    shown = [p for p in parts if not p.startswith(('loss', 'perplexity'))]
    self._bar.set_postfix_str('  '.join(shown))
    if self._bar.disable:
      left = tqdm.tqdm.format_interval((self._num_steps - step) * per_step)
      text = '  '.join([*parts, f'{left} left'])
      logging.info('step %d/%d  %s', step, self._num_steps, text)
    return {'images_per_second': speed, 'data_wait': wait}

  def say(self, text: str) -> None:
    """One line of text, above the bar if there is one."""
    if self._bar.disable:
      logging.info('%s', text)
    else:
      self._bar.write(text, file=sys.stderr)
