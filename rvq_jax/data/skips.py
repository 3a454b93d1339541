"""Images that cannot be decoded: skipped, named, counted, and limited."""

import logging
from collections.abc import Callable

import numpy as np

from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import ImageError, decode_image

MAX_SHARE = 0.01
"""A run stops when more than this share of its records cannot be decoded."""

OnSkip = Callable[[str, str], None]
"""Called with the name of an image and the reason it was skipped."""


class SkipLog:
  """Counts the records that were skipped, each once.

  Args:
    total: number of records in the split.
    on_skip: called once per skipped record; None logs a warning.
  """

  def __init__(self, total: int, on_skip: OnSkip | None = None):
    self._total = total
    self._on_skip = on_skip or _warn
    self._seen: set[int] = set()

  @property
  def count(self) -> int:
    """Number of different records skipped so far."""
    return len(self._seen)

  def add(self, index: int, name: str, reason: str) -> None:
    """Notes that a record was skipped.

    Args:
      index: its index in the source.
      name: of the image.
      reason: why it cannot be used.

    Raises:
      ValueError: if more than 1 % of the records have now been skipped.
    """
    if index in self._seen:
      return
    self._seen.add(index)
    self._on_skip(name, reason)
    if self.count > MAX_SHARE * self._total:
      raise ValueError(
        f'{self.count} of {self._total} images cannot be decoded, more than '
        f'{MAX_SHARE:.0%}; the last is {name}: {reason}; repair or remove them'
      )


def _warn(name: str, reason: str) -> None:
  """Logs one skipped image."""
  logging.warning('skipped image %s: %s', name, reason)


def try_image(
  source: Source,
  index: int,
  transform: Callable[[np.ndarray], np.ndarray],
  *,
  shorter_side: int | None = None,
) -> tuple[np.ndarray | None, str, str]:
  """Reads, decodes and transforms one record, if it can be read.

  Args:
    source: to read from.
    index: of the record.
    transform: applied to the decoded image, uint8 [h, w, 3].
    shorter_side: passed to `decode_image`.

  Returns:
    (image, name, ''), or (None, name, reason) for a record to skip.

  Raises:
    OSError: there is no memory for the image, which may be a sound one.
  """
  name = f'record {index}'
  try:
    record = source[index]
    name = record.name
    image = decode_image(record.image, name=name, shorter_side=shorter_side)
    return transform(image), name, ''
  except (ImageError, OSError) as error:
    return None, name, str(error)
  except MemoryError as error:
    raise OSError(
      f'out of memory while decoding {name}; lower the batch size or the '
      'number of workers, or free some, and start the same command again'
    ) from error
