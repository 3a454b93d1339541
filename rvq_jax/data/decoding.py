"""Decodes images in threads, and names unreadable ones."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np

from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import CROPS, ImageError, decode_crop

MAX_SHARE = 0.01  # a larger share of unreadable images ends the run
_ATTEMPTS = 4


class DecodeErrors:
  """Names the unreadable images of `source` (`rows`).

  With `limited`, more than 1 % of the whole data set ends the work.
  """

  def __init__(self, source: Source, limited: bool = True):
    self.rows: set[int] = set()
    self._total, self._limited = source.set_size or len(source), limited

  def add(self, row: int, name: str, reason: str) -> None:
    """Logs the image at index `row` once; over the limit, a ValueError."""
    if row in self.rows:
      return
    self.rows.add(row)
    logging.warning('skipped image %s: %s', name, reason)
    if self._limited and len(self.rows) > MAX_SHARE * self._total:
      raise ValueError(
        f'{len(self.rows)} of {self._total} images cannot be decoded, over '
        f'{MAX_SHARE:.0%}; repair or remove them; the last is {name}: {reason}'
      )


def decode_record(source: Source, row: int, decode):
  """Reads an image; returns (image, name, '') or (None, name, reason).

  `decode` is `transforms.decode_image`, or `decode_crop` with its arguments.
  """
  name = f'record {row}'
  try:
    record = source[row]
    name = record.name
    return decode(record.image, name=name), name, ''
  except (ImageError, OSError) as error:
    return None, name, str(error)
  except MemoryError as error:
    raise OSError(
      f'out of memory while decoding {name}; lower the batch size or the '
      'number of workers and start the same command again'
    ) from error


def map_ahead(function, items: Iterable, ahead: int, threads: int) -> Iterator:
  """map(function, items) in threads, at most `ahead` items in advance."""
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


def decode_ahead(source: Source, rows, size: int, errors, ahead: int):
  """Yields (row, central square or None, name) in order, from `map_ahead`."""
  decode = functools.partial(decode_crop, size=size)

  def read(row):
    return row, *decode_record(source, row, decode)

  decoded = map_ahead(read, rows, ahead, os.cpu_count())
  for row, image, name, reason in decoded:
    if image is None:
      errors.add(row, name, reason)
    yield row, image, name


@dataclasses.dataclass(frozen=True)
class LoadImage:
  """Decodes and crops one record; a random one replaces a corrupt one.

  The record's own generator draws both, so a batch is always the same. Four
  corrupt records in a row raise an OSError.
  """

  source: Source
  size: int
  crop: str
  crop_scale: tuple[float, float]

  def __call__(self, row: int, rng: np.random.Generator):
    """Returns {'image': uint8 [size, size, 3], 'failures': object []}."""
    # One list of (row, name, reason), boxed because Grain stacks arrays.
    failures, box = [], np.empty((), object)
    box[()] = failures
    crop = functools.partial(CROPS[self.crop], rng=rng, scale=self.crop_scale)
    decode = functools.partial(decode_crop, size=self.size, box=crop)
    for _ in range(_ATTEMPTS):
      drawn = rng.bit_generator.state
      image, name, reason = decode_record(self.source, row, decode)
      if image is not None:
        return {'image': image, 'failures': box}
      failures.append((row, name, reason))
      rng.bit_generator.state = drawn  # whether or not a crop was drawn
      row = int(rng.integers(len(self.source)))
    reasons = '; '.join(f'{name}: {reason}' for _, name, reason in failures)
    raise OSError(
      f'{_ATTEMPTS} records in a row cannot be read ({reasons}); check their '
      'disk, or repair or remove them; the same command resumes from the last '
      'checkpoint'
    )
