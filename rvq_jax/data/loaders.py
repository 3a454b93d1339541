"""Batches for training, from memory or through Grain, and for evaluation."""

import contextlib
import functools
import itertools
import logging
import os
import weakref
from collections.abc import Iterator

import numpy as np
from absl import flags

from rvq_jax.data import decoding, workers
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import CROPS

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images


def seeded_permutation(n: int, *entropy: int) -> np.ndarray:
  """Returns a permutation of range(n), int64 [n], by non-negative integers.

  NumPy guarantees the raw words of Philox, unlike `Generator.permutation`.
  """
  words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
  return np.argsort(words, kind='stable')


class TrainLoader:
  """Endless training batches, resumable at any position.

  `next(loader)` returns this process's rows of the next batch: {'image': uint8
  [batch_size / process_count, size, size, 3]}. A batch depends only on its
  step, the source, the seed and the global batch size. An epoch is
  `steps_per_epoch` full batches of a permutation of `num_examples` images.
  """

  def __init__(self, num_examples, batch_size, process_index, process_count):
    self._local_size = _local_size(batch_size, process_count)
    self._process_index, self._process_count = process_index, process_count
    if num_examples < batch_size:
      raise ValueError(
        f'expected at least one batch of {batch_size} training images, got '
        f'{num_examples} images; lower batch_size'
      )
    self.num_examples = num_examples
    self.steps_per_epoch = num_examples // batch_size
    self._step = 0

  def position(self) -> dict[str, int]:
    """Returns the position for `seek` to continue with the next batch."""
    return {'step': self._step, 'images': self.num_examples}

  def seek(self, position: dict[str, int]) -> None:
    """Makes the batch at `position` the next one; refuses another data set.

    A loss of up to 2 % only gives a warning: the 1 % that a divided set may
    lose can all be training images.
    """
    had, count = position['images'], self.num_examples
    if not had * (1 - 2 * decoding.MAX_SHARE) <= count <= had:
      raise ValueError(
        f'the training set has {count} readable images and had {had}; restore '
        'it, or start a new run in another --workdir'
      )
    if count < had:
      logging.warning(
        'the training set has %d readable images and had %d: the run resumes, '
        'but not bit-exact',
        *(count, had),
      )
    self._step = position['step']
    self.close()

  def close(self) -> None:
    """Ends threads and worker processes until the next call for a batch."""


class MemoryLoader(TrainLoader):
  """Batches from decoded images in memory, 10 to 20 times as fast."""

  def __init__(self, source: Source, image_size: int, seed: int, *shared):
    images = np.empty((len(source), image_size, image_size, 3), np.uint8)
    kept = 0
    for batch in eval_batches(source, batch_size=512, image_size=image_size):
      start, kept = kept, kept + batch['mask'].sum()
      images[start:kept] = batch['image'][batch['mask']]
    self._images = images[:kept]
    super().__init__(int(kept), *shared)
    order = functools.partial(seeded_permutation, self.num_examples, seed)
    self._order = functools.lru_cache(maxsize=2)(order)

  def __next__(self):
    epoch, batch = divmod(self._step, self.steps_per_epoch)
    part = batch * self._process_count + self._process_index
    start = part * self._local_size
    self._step += 1
    rows = self._order(epoch)[start : start + self._local_size]
    return {'image': self._images[rows]}


class GrainLoader(TrainLoader):
  """Batches that threads, or `num_workers` processes, decode each time."""

  def __init__(self, load: decoding.LoadImage, seed, num_workers, *shared):
    super().__init__(len(load.source), *shared)
    self._load, self._seed, self._workers = load, seed, num_workers
    self._errors = decoding.DecodeErrors(load.source)
    self._iterator = self._end = None

  def __next__(self):
    try:
      batch = next(self._iterator) if self._iterator else self._first()
    except Exception as error:
      self.close()  # otherwise Grain would end the epoch silently
      if 'terminated unexpectedly' not in str(error):
        raise
      if 'exit code 1.' in str(error):  # of Python, after an exception
        raise ValueError(
          'a data worker failed, see its error above; each worker imports your '
          "script: put the script's actions under if __name__ == '__main__':"
        ) from error
      raise ChildProcessError(
        f'a data worker died ({error}); if it ran out of memory or /dev/shm, '
        'lower data.num_workers or batch_size; the same command resumes from '
        'the last checkpoint'
      ) from error
    self._step += 1
    for row, name, reason in itertools.chain(*batch['failures']):
      self._errors.add(row, name, reason)
    # A copy frees the workers' shared memory.
    return {'image': np.array(batch['image'])}

  def _first(self):
    """Starts threads or workers; returns the batch of this step."""
    with workers.hold_signals() if self._workers else contextlib.nullcontext():
      self._iterator = iter(self._batches())
      # At exit Python sends workers SIGTERM, which they ignore.
      self._end = weakref.finalize(self, self._iterator.close)
      return next(self._iterator)

  def _batches(self):
    """Makes the Grain pipeline, each stage with random access by step."""
    import grain  # takes a second to load

    # Mix the seed: Grain shuffles epoch k with seed + k, so neighbouring seeds
    # would share orders.
    mixed = np.random.SeedSequence(self._seed).generate_state(2).tolist()
    used = self.steps_per_epoch * self._local_size * self._process_count
    threads = 1 if self._workers else min(os.cpu_count() or 1, 16)
    batches = (
      grain.MapDataset.range(self.num_examples)
      .shuffle(seed=mixed[0])
      .random_map(self._load, seed=mixed[1])[:used]
      .batch(self._local_size)[self._process_index :: self._process_count]
      .repeat()[self._step :]
      .to_iter_dataset(grain.ReadOptions(threads, threads))
    )
    if not self._workers:
      return batches
    if not flags.FLAGS.is_parsed():  # workers inherit absl's flags
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
      num_workers=self._workers, per_worker_buffer_size=2
    )
    return batches.mp_prefetch(options, worker_init_fn=workers.init_worker)

  def close(self):
    """See `TrainLoader`."""
    if self._end is not None:
      self._end()
    self._iterator = self._end = None


def make_train_loader(
  source: Source,
  *,
  batch_size: int,
  image_size: int,
  crop: str = 'none',
  crop_scale: tuple[float, float] = (0.08, 1.0),
  seed: int = 0,
  in_memory: str | bool = 'auto',
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> TrainLoader:
  """Makes an endless loader of training batches, in memory or through Grain.

  Args:
    batch_size: images per batch, summed over all `process_count` processes.
    image_size: side of the images in a batch, in pixels.
    crop: the centre ('none') or a random square ('random') of the scaled image,
      or a box with a share of its area in `crop_scale` ('random_resized').
    in_memory: keep the decoded set, if there are no crops; 'auto': up to 4 GiB.
    num_workers: processes that decode; 0 decodes in threads.
  """
  if crop not in CROPS:
    raise ValueError(f'crop: expected one of {", ".join(CROPS)}, got {crop!r}')
  if in_memory == 'auto':
    in_memory = len(source) * image_size**2 * 3 <= MEMORY_LIMIT
  shared = batch_size, process_index, process_count
  if in_memory and crop == 'none':
    return MemoryLoader(source, image_size, seed, *shared)
  load = decoding.LoadImage(source, image_size, crop, crop_scale)
  return GrainLoader(load, seed, num_workers, *shared)


def eval_batches(
  source: Source,
  *,
  batch_size,
  image_size,
  process_index=0,
  process_count=1,
  limited: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
  """Reads a split once, in order, scaled and centre-cropped.

  Yields {'image': uint8 [B, size, size, 3], 'mask': bool [B]}, B = batch_size /
  process_count, equally often in each process. Unreadable images, and rows that
  fill the last batch, are zero and have mask False. If over 1 % of the whole
  set is unreadable, a ValueError follows, unless `limited` is False.
  """
  local_size = _local_size(batch_size, process_count)
  count, first = len(source), process_index * local_size
  batches = [
    range(count)[start : start + local_size]
    for start in range(first, first + count, batch_size)
  ]
  rows = itertools.chain(*batches)
  errors = decoding.DecodeErrors(source, limited)
  decoded = decoding.decode_ahead(
    source, rows, image_size, errors, 3 * local_size
  )
  for batch in batches:
    image = np.zeros((local_size, image_size, image_size, 3), np.uint8)
    mask = np.zeros(local_size, bool)
    for i, (_, pixels, _) in enumerate(itertools.islice(decoded, len(batch))):
      if pixels is not None:
        image[i], mask[i] = pixels, True
    yield {'image': image, 'mask': mask}


def _local_size(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      'expected a positive global batch size that the number of processes '
      f'divides, got batch_size {batch_size} for {process_count} processes'
    )
  return batch_size // process_count
