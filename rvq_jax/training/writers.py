"""Metric files, TensorBoard events and progress of a run.

The methods are named as in `clu.metric_writers`, which import TensorFlow.
"""

import contextlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rvq_jax.io import write_atomic


class JsonlWriter:
  """Appends one JSON object per call to WORKDIR/metrics.jsonl.

  Drops lines of steps after `start_step`, the last checkpoint's.
  """

  def __init__(self, workdir, *, start_step: int = 0):
    path = Path(workdir) / 'metrics.jsonl'
    if path.exists():
      kept = [line for line in read_jsonl(path) if line['step'] <= start_step]
      write_atomic(path, ''.join(json.dumps(line) + '\n' for line in kept))
    self._file = open(path, 'a')  # noqa: SIM115 - closed by close()
    self.flush, self.close = self._file.flush, self._file.close

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}; a nonfinite number becomes null."""
    values = {name: float(value) for name, value in scalars.items()}
    values = {n: x if math.isfinite(x) else None for n, x in values.items()}
    self._file.write(json.dumps({'step': int(step)} | values) + '\n')


class TensorBoardWriter:
  """Writes TensorBoard events to WORKDIR/tensorboard.

  TensorBoard hides older events of steps after `start_step`. tensorboardX's
  SummaryWriter writes in a thread, where a full disk goes unnoticed.
  """

  def __init__(self, workdir, *, start_step: int = 0):
    # The import takes half a second, and only training needs it.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._summary, self._event = summary, Event
    folder = Path(workdir) / 'tensorboard'
    folder.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
    self._file = record_writer.RecordWriter(str(folder / name))
    self.flush, self.close = self._file.flush, self._file.close
    start = SessionLog(status=SessionLog.START)
    self._write(file_version='brain.Event:2')
    self._write(step=start_step + 1, session_log=start)

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}."""
    for name, value in scalars.items():
      self._write(step=step, summary=self._summary.scalar(name, value))

  def write_images(self, step: int, images) -> None:
    """Writes {name: uint8 [h, w, 3]}."""
    for name, image in images.items():
      image = self._summary.image(name, image, dataformats='HWC')
      self._write(step=step, summary=image)

  def write_histograms(self, step: int, arrays) -> None:
    """Writes {name: array [n]}."""
    for name, values in arrays.items():
      histogram = self._summary.histogram(name, values, bins=64)
      self._write(step=step, summary=histogram)

  def _write(self, **fields) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._file.write(event.SerializeToString())


class MultiWriter:
  """Passes every call to each writer that has the method."""

  def __init__(self, writers):
    self._writers = tuple(writers)

  def close(self) -> None:
    """Closes all writers, even if the disk is too full for one."""
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)

  def __getattr__(self, method):
    def call_each(*arguments):
      for writer in self._writers:
        if hasattr(writer, method):
          getattr(writer, method)(*arguments)

    return call_each


def read_jsonl(path) -> list[dict]:
  """The lines of a metrics file; the last one may be cut off.

  One warning counts the lines that are not a JSON object with an integer
  'step'.
  """
  *lines, last = Path(path).read_text('utf-8', 'replace').split('\n')
  records = [_parsed(line) for line in lines]
  if damaged := records.count(None):
    logging.warning(
      '%s: skipped %d damaged lines, the first is line %d',
      *(path, damaged, records.index(None) + 1),
    )
  return [record for record in [*records, _parsed(last)] if record is not None]


def _parsed(line: str) -> dict | None:
  with contextlib.suppress(ValueError, RecursionError):
    record = json.loads(line)
    if isinstance(record, dict) and type(record.get('step')) is int:
      return record
  return None


def _shows_a_bar(stream) -> bool:
  """Whether a stream is a terminal of over 0 rows; else tqdm writes nothing."""
  with contextlib.suppress(OSError):  # a stream without a file
    return os.get_terminal_size(stream.fileno()).lines > 0
  return stream.isatty()


class Progress:
  """Reports steps by a bar, with the log above it, or by lines in the log."""

  def __init__(self, start: int, num_steps: int, batch_size: int):
    self._num_steps, self._batch_size = num_steps, batch_size
    self._step, self._since = start, time.monotonic()
    lines = not ('ipykernel' in sys.modules or _shows_a_bar(sys.stderr))
    self._logs = contextlib.nullcontext() if lines else logging_redirect_tqdm()
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=start,
      dynamic_ncols=True,
      disable=lines,
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
    """Counts a step that the devices have received."""
    self._bar.update()

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Announces a compilation; the time does not count as training."""
    if self._bar.disable:
      logging.info('compiling the train step')
    self._bar.set_description_str('compiling the train step ')
    with self.paused():
      yield
    self._bar.set_description_str('')

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """The time inside does not count as training."""
    start = time.monotonic()
    yield
    self._since += time.monotonic() - start

  def report(
    self, step: int, scalars: dict[str, float], *, waited: float = 0.0
  ) -> dict[str, float]:
    """Shows the means of scalars over the steps since the last report.

    Returns images_per_second, and data_wait: the share of the time (`waited`
    seconds) in which the devices had no data.
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
    # The bar has less room than a log line.
    short = [p for p in parts if not p.startswith(('loss', 'perplexity'))]
    self._bar.set_postfix_str('  '.join(short))
    if self._bar.disable:
      left = tqdm.tqdm.format_interval((self._num_steps - step) * per_step)
      text = '  '.join([*parts, f'{left} left'])
      logging.info('step %d/%d  %s', step, self._num_steps, text)
    return {'images_per_second': speed, 'data_wait': wait}

  def say(self, text: str) -> None:
    """Shows one line of text, above the bar if there is one."""
    if self._bar.disable:
      logging.info('%s', text)
    else:
      self._bar.write(text, file=sys.stderr)
