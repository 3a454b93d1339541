"""Batches for training and for evaluation.

Training batches come from memory where the decoded set is small, else from
Grain (stream.py); both have the interface of `TrainLoader`. Evaluation reads
a split once, in order.
"""

import collections
import concurrent.futures
import functools
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np

from rvq_jax.data.memory import MemoryLoader
from rvq_jax.data.skips import OnSkip, SkipLog, try_image
from rvq_jax.data.sources import Source
from rvq_jax.data.train_loader import TrainLoader
from rvq_jax.data.transforms import resize_and_center_crop

CROPS = ('none', 'random', 'random_resized')
MEMORY_LIMIT = 4 * 2**30
"""Bytes of decoded images up to which 'auto' keeps a set in memory."""


def make_train_loader(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  crop: Literal['none', 'random', 'random_resized'] = 'none',
  crop_scale: tuple[float, float] = (0.08, 1.0),
  seed: int = 0,
  in_memory: Literal['auto'] | bool = 'auto',
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  on_skip: OnSkip | None = None,
) -> TrainLoader:
  """Makes an endless loader of training batches.

  Args:
    source: the training images.
    batch_size: of all processes together.
    image_size: side of the images in a batch, in pixels.
    crop: 'none' scales the shorter side and takes the centre; 'random' takes
      a random square instead; 'random_resized' a box of random size.
    crop_scale: least and greatest share of area of a 'random_resized' box.
    seed: of the order and of the crops.
    in_memory: keep the decoded set in memory; 'auto' does so up to 4 GiB.
      Random crops are never kept.
    num_workers: processes that decode; 0 decodes in threads.
    process_index: which of the processes that share a batch this is.
    process_count: how many there are; it divides `batch_size`.
    on_skip: called with (name, reason) of each image that cannot be decoded,
      once; None logs a warning.

  Returns:
    A `TrainLoader`; a `MemoryLoader` where the set is kept in memory.

  Raises:
    ValueError: if an argument is out of range, or more than 1 % of the images
      cannot be decoded.
  """
  if crop not in CROPS:
    raise ValueError(f'expected crop to be one of {CROPS}, got {crop!r}')
  if image_size < 1 or num_workers < 0 or seed < 0:
    raise ValueError(
      'expected image_size >= 1, num_workers >= 0 and seed >= 0, got '
      f'{image_size}, {num_workers} and {seed}'
    )
  if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
    raise ValueError(
      f'expected 0 < crop_scale[0] <= crop_scale[1] <= 1, got {crop_scale}'
    )
  shared = {
    'batch_size': batch_size,
    'image_size': image_size,
    'seed': seed,
    'process_index': process_index,
    'process_count': process_count,
    'on_skip': on_skip,
  }
  if _keep(in_memory, crop, len(source) * image_size**2 * 3):
    return MemoryLoader(source, **shared)
  from rvq_jax.data.stream import StreamLoader

  return StreamLoader(
    source,
    crop=crop,
    crop_scale=crop_scale,
    num_workers=num_workers,
    **shared,
  )


def _keep(in_memory: Literal['auto'] | bool, crop: str, size: int) -> bool:
  """Decides whether to keep `size` bytes of decoded images in memory."""
  if in_memory not in ('auto', True, False):
    raise ValueError(
      f"expected in_memory to be 'auto', True or False, got {in_memory!r}"
    )
  if in_memory is True and crop != 'none':
    raise ValueError(
      f"crop {crop!r} needs the whole image each time; expected crop 'none' "
      'with in_memory=True, or in_memory=False'
    )
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if in_memory is True and size > memory:
    raise ValueError(
      f'the decoded images take {size / 1e9:,.1f} GB and this machine has '
      f"{memory / 1e9:,.1f} GB; expected in_memory='auto' or 'no'"
    )
  if in_memory == 'auto':
    return crop == 'none' and size <= MEMORY_LIMIT
  return in_memory


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  process_index: int = 0,
  process_count: int = 1,
  on_skip: OnSkip | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Reads a split once, in order, scaled and centre-cropped.

  Args:
    source: the images.
    batch_size: of all processes together.
    image_size: side of the images in a batch, in pixels.
    process_index: which of the processes that share a batch this is.
    process_count: how many there are; it divides `batch_size`.
    on_skip: called with (name, reason) of each image that cannot be decoded;
      None logs a warning.

  Yields:
    {'image': uint8 [B, size, size, 3], 'mask': bool [B]} with
    B = batch_size / process_count, as many on every process. Rows that fill
    the last batch, and images that cannot be decoded, are zero and have mask
    False.

  Raises:
    ValueError: if the processes do not divide the batch, or more than 1 % of
      the images cannot be decoded.
  """
  if process_count < 1 or batch_size < 1 or batch_size % process_count:
    raise ValueError(
      'expected a positive global batch size that the number of processes '
      f'divides, got batch_size {batch_size} for {process_count} processes'
    )
  local_size = batch_size // process_count
  skips = SkipLog(len(source), on_skip)
  crop = functools.partial(resize_and_center_crop, size=image_size)
  first = process_index * local_size
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    waiting = collections.deque()
    for start in range(0, len(source), batch_size):
      end = min(start + first + local_size, len(source))
      rows = range(min(start + first, end), end)
      tasks = [pool.submit(try_image, source, row, crop) for row in rows]
      waiting.append((rows, tasks))
      if len(waiting) > 2:  # decode two batches ahead of the caller
        yield _collect(*waiting.popleft(), local_size, image_size, skips)
    while waiting:
      yield _collect(*waiting.popleft(), local_size, image_size, skips)


def _collect(
  rows: range,
  tasks: list[concurrent.futures.Future],
  batch_size: int,
  image_size: int,
  skips: SkipLog,
) -> dict[str, np.ndarray]:
  """Makes one padded evaluation batch of decoded rows."""
  image = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
  mask = np.zeros(batch_size, bool)
  for i, (row, task) in enumerate(zip(rows, tasks, strict=True)):
    decoded, name, reason = task.result()
    if decoded is None:
      skips.add(row, name, reason)
    else:
      image[i], mask[i] = decoded, True
  return {'image': image, 'mask': mask}
