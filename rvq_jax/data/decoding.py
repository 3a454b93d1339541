"""Decoding images, in threads and in worker processes.

Those that cannot be decoded are named, and their share is limited.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import numpy as np

from rvq_jax.data import transforms
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import ImageError, decode_image

MAX_SHARE = 0.01  # of the images; more that cannot be decoded end the run
STOP_SIGNALS = (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP)
"""What asks a run to stop (SLURM's --signal sends SIGUSR1 or SIGUSR2)."""
_ATTEMPTS = 4


class DecodeErrors:
  """Names the images of a source that cannot be decoded, and limits them.

  `rows` are their indices in the source, `total` is how many images it has.
  """

  def __init__(self, total: int):
    self.rows: set[int] = set()
    self._total = total

  def add(self, row: int, name: str, reason: str) -> None:
    """Logs the image at index `row`; over 1 % of all raise a ValueError."""
    if row in self.rows:
      return
    self.rows.add(row)
    logging.warning('left out image %s: %s', name, reason)
    if len(self.rows) > MAX_SHARE * self._total:
      raise ValueError(
        f'{len(self.rows)} of {self._total} images cannot be decoded, over '
        f'{MAX_SHARE:.0%}; repair or remove them; the last is {name}: {reason}'
      )


def decode_record(
  source: Source, row: int, transform, shorter_side: int | None = None
) -> tuple[np.ndarray | None, str, str]:
  """Reads, decodes and transforms the image at index `row`, if it can.

  Returns:
    (image, name, ''), or (None, name, reason) if it cannot be decoded.
  """
  name = f'record {row}'
  try:
    record = source[row]
    name = record.name
    image = decode_image(record.image, name=name, shorter_side=shorter_side)
    return transform(image), name, ''
  except (ImageError, OSError) as error:
    return None, name, str(error)
  except MemoryError as error:
    raise OSError(
      f'out of memory while decoding {name}; lower the batch size or the '
      'number of workers and start the same command again'
    ) from error


def map_ahead(function, items: Iterable, ahead: int, threads: int) -> Iterator:
  """map(function, items) in threads, at most `ahead` before the caller."""
  items, waiting = iter(items), collections.deque()
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    while True:
      for item in itertools.islice(items, ahead - len(waiting)):
        waiting.append(pool.submit(function, item))
      if not waiting:
        return
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def decode_ahead(
  source: Source, rows: Iterable[int], transform, errors, ahead: int
) -> Iterator[tuple[int, np.ndarray | None, str]]:
  """Decodes images in threads, in order, at most `ahead` before the caller.

  Yields (row, image, name); the image is None where it cannot be decoded.
  """

  def decode(row):
    return row, *decode_record(source, row, transform)

  decoded = map_ahead(decode, rows, ahead, os.cpu_count())
  for row, image, name, reason in decoded:
    if image is None:
      errors.add(row, name, reason)
    yield row, image, name


@dataclasses.dataclass(frozen=True)
class LoadImage:
  """Decodes and crops one record; a random one stands in for a corrupt one.

  It is drawn from the record's own generator, so it too is the same whenever
  the batch is made. Four corrupt ones in a row raise an OSError.
  """

  source: Source
  size: int
  crop: str
  crop_scale: tuple[float, float]

  def __call__(self, row: int, rng: np.random.Generator):
    """Returns {'image': uint8 [size, size, 3], 'bad': rows, int64 [4]}."""
    bad, reasons = np.full(_ATTEMPTS, -1, np.int64), []
    cut = functools.partial(self._cut, rng=rng)
    # A small box may need every pixel of a photograph, a square does not.
    side = None if self.crop == 'random_resized' else self.size
    for attempt in range(_ATTEMPTS):
      image, name, reason = decode_record(self.source, row, cut, side)
      if image is not None:
        return {'image': image, 'bad': bad}
      bad[attempt] = row
      reasons.append(f'{name}: {reason}')
      row = int(rng.integers(len(self.source)))
    raise OSError(
      f'{_ATTEMPTS} records in a row cannot be read ({"; ".join(reasons)}); '
      'check the disk that holds them, or repair or remove them; the same '
      'command resumes from the last checkpoint'
    )

  def _cut(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if self.crop == 'none':
      return transforms.resize_and_center_crop(image, self.size)
    if self.crop == 'random':
      return transforms.random_crop(image, self.size, rng)
    return transforms.random_resized_crop(
      image, self.size, rng, scale=self.crop_scale
    )


@contextlib.contextmanager
def hold_signals():
  """Blocks the stop signals here and in workers that are started meanwhile."""
  old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
  try:
    resource_tracker.ensure_running()  # unblocks two of them when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, old)


def ignore_signals() -> None:
  """Makes a worker ignore the stop signals: the run ends its workers."""
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def exit_with_parent() -> None:
  """Ends a worker when its parent ends, however it ends."""
  multiprocessing.parent_process().join()
  os._exit(1)


def init_worker(*_) -> None:
  """Prepares a worker process of Grain."""
  ignore_signals()
  threading.Thread(target=exit_with_parent, daemon=True).start()
