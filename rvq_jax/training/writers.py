"""Metric writers with the method names of `clu.metric_writers`.

clu's own writers import TensorFlow; these write JSON lines and, through
tensorboardX, TensorBoard events.
"""

import errno
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np

from rvq_jax.io import write_atomic


class JsonlWriter:
  """Appends one JSON object a call to WORKDIR/metrics.jsonl.

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

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}; a number that is not finite becomes null."""
    line = {'step': int(step)}
    for name, value in scalars.items():
      value = float(value)
      line[name] = value if math.isfinite(value) else None
    self._file.write(json.dumps(line) + '\n')

  def write_images(self, step: int, images) -> None:
    """JSON lines hold no images."""

  def write_histograms(self, step: int, arrays) -> None:
    """JSON lines hold no histograms."""

  def flush(self) -> None:
    """Hands what was written to the operating system."""
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()


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
    self._failed = False

  def _check_thread(self):
    # The thread that writes ends at its first error, and whoever hands it more
    # then waits for ever.
    if self._failed or self._events._worker.is_alive():
      return
    self._failed = True
    self._events._event_queue.cancel_join_thread()
    raise OSError(
      errno.ENOSPC
      if shutil.disk_usage(self._folder).free < 2**20
      else errno.EIO,
      'TensorBoard events could not be written',
      str(self._folder),
    )

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number}."""
    for name, value in scalars.items():
      self._check_thread()
      self._writer.add_scalar(name, float(value), step)

  def write_images(self, step: int, images) -> None:
    """Writes {name: uint8 [h, w, 3]}."""
    for name, image in images.items():
      self._check_thread()
      self._writer.add_image(name, image, step, dataformats='HWC')

  def write_histograms(self, step: int, arrays) -> None:
    """Writes {name: numbers [n]}."""
    for name, values in arrays.items():
      self._check_thread()
      self._writer.add_histogram(name, np.asarray(values), step)

  def flush(self) -> None:
    """Hands what was written to the operating system."""
    self._check_thread()
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes the file; nothing where it could not be written."""
    if not self._failed and self._events._worker.is_alive():
      self._writer.close()


class MultiWriter:
  """Sends every call to each of several writers.

  Args:
    writers: the writers.
  """

  def __init__(self, writers):
    self._writers = tuple(writers)

  def write_scalars(self, step: int, scalars) -> None:
    """Writes {name: number} to each."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images) -> None:
    """Writes {name: uint8 [h, w, 3]} to each."""
    for writer in self._writers:
      writer.write_images(step, images)

  def write_histograms(self, step: int, arrays) -> None:
    """Writes {name: numbers [n]} to each."""
    for writer in self._writers:
      writer.write_histograms(step, arrays)

  def flush(self) -> None:
    """Flushes each."""
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Closes each."""
    for writer in self._writers:
      writer.close()


def read_jsonl(path) -> list[dict]:
  """The lines of a metrics file.

  Lines that cannot be used are left out, and a warning says which: those that
  are no JSON, or no object with a number 'step'. Of a last line that was cut
  off in writing nothing is said.

  Args:
    path: of the file.

  Returns:
    An object for each line.
  """
  lines = Path(path).read_text('utf-8', 'replace').split('\n')
  records, damaged = [], []
  for number, line in enumerate(lines, 1):
    record = _parsed(line)
    if record is not None:
      records.append(record)
    elif number < len(lines):
      damaged.append(number)
  if damaged:
    first = ', '.join(map(str, damaged[:5])) + ', ...' * (len(damaged) > 5)
    logging.warning(
      '%s: left out %d damaged of %d lines (line %s)',
      path,
      len(damaged),
      len(lines) - 1,
      first,
    )
  return records


def _parsed(line: str) -> dict | None:
  """A line of a metrics file, or None where it is damaged."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  step = record.get('step') if isinstance(record, dict) else None
  whole = isinstance(step, int) and not isinstance(step, bool)
  return record if whole else None
