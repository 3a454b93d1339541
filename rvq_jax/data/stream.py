"""Training batches through Grain: decoded anew each time they are used.

  range(n) -> shuffle, another order in every epoch
           -> decode and crop, with a random generator of their own
           -> full global batches -> this process's rows -> repeat

Every stage has random access, so batch `step` can be computed without the
batches before it, and it is the same whoever computes it: threads, worker
processes, or a run that was interrupted.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from rvq_jax.data.skips import OnSkip, SkipLog, try_image
from rvq_jax.data.sources import Source
from rvq_jax.data.train_loader import TrainLoader
from rvq_jax.data.transforms import (
  random_crop,
  random_resized_crop,
  resize_and_center_crop,
)

_ATTEMPTS = 4
_NOTHING = -1
_MAX_THREADS = 16
# What asks a run to stop. SIGUSR1 and SIGUSR2 are what SLURM's --signal is told
# to send before the time is up; SIGHUP comes when a terminal closes. They reach
# every process of a run: the first one decides, and needs its workers till
# then.
STOPS = (
  signal.SIGTERM,
  signal.SIGINT,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGHUP,
)


class LoadImage(grain.transforms.RandomMap):
  """Decodes and crops one record; a corrupt one is replaced.

  The replacement is drawn from the record's own random generator, so it too
  is the same whenever the batch is made.

  Args:
    source: to read from.
    image_size: side of the result in pixels.
    crop: 'none', 'random' or 'random_resized'.
    crop_scale: share of area of a 'random_resized' box.
  """

  def __init__(
    self,
    source: Source,
    image_size: int,
    crop: str,
    crop_scale: tuple[float, float],
  ):
    self._source = source
    self._size = image_size
    self._crop = crop
    self._scale = crop_scale

  def random_map(
    self, index: int, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Loads record `index`.

    Args:
      index: of the record.
      rng: of this record in this epoch.

    Returns:
      image: uint8 [size, size, 3].
      bad: int64 [4], the records found corrupt on the way, padded with -1.

    Raises:
      OSError: four records in a row cannot be read; nothing that could stand
        for them is trained on.
    """
    bad = np.full(_ATTEMPTS, _NOTHING, np.int64)
    # A small box may need every pixel of a photograph, a square does not.
    shorter_side = None if self._crop == 'random_resized' else self._size
    faults = []
    for attempt in range(_ATTEMPTS):
      image, name, reason = try_image(
        self._source,
        index,
        functools.partial(self._cut, rng=rng),
        shorter_side=shorter_side,
      )
      if image is not None:
        return {'image': image, 'bad': bad}
      bad[attempt] = index
      faults.append(f'{name}: {reason}')
      index = int(rng.integers(len(self._source)))
    raise OSError(
      f'{_ATTEMPTS} records in a row cannot be read ({"; ".join(faults)}); the '
      'disk that holds them may be out of reach: see to it, or repair or '
      'remove them; the same command goes on from the last checkpoint'
    )

  def _cut(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crops and resizes a decoded image."""
    if self._crop == 'none':
      return resize_and_center_crop(image, self._size)
    if self._crop == 'random':
      return random_crop(image, self._size, rng)
    return random_resized_crop(image, self._size, rng, scale=self._scale)


@contextlib.contextmanager
def _signals_held():
  """Holds back the signals of a run, in this thread and in what it starts.

  A worker is deaf from its first moment: it takes seconds to come to
  `_obey_parent`.
  """
  old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
  try:
    # Python's tracker of shared memory dies of the others; where it starts, it
    # lets the two that it ignores through again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _obey_parent(worker: int, workers: int) -> None:
  """Lets a worker end with its parent, and by no signal meant for the run.

  Grain tells its workers to end through shared memory. One whose parent was
  killed would wait for it for ever.
  """
  del worker, workers
  for number in STOPS:
    signal.signal(number, signal.SIG_IGN)

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class StreamLoader(TrainLoader):
  """Batches decoded by threads or by worker processes.

  Args:
    source: images of any size.
    batch_size: of all processes together.
    image_size: side in pixels.
    crop: 'none', 'random' or 'random_resized'.
    crop_scale: share of area of a 'random_resized' box.
    seed: of the order and of the crops.
    num_workers: processes that decode; 0 decodes in threads.
    process_index: which process this is.
    process_count: how many share each batch.
    on_skip: called with (name, reason) of each corrupt image, once.
  """

  def __init__(
    self,
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    crop: str = 'none',
    crop_scale: tuple[float, float] = (0.08, 1.0),
    seed: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_skip: OnSkip | None = None,
  ):
    super().__init__(
      num_examples=len(source),
      batch_size=batch_size,
      process_index=process_index,
      process_count=process_count,
    )
    self._source = source
    self._workers = num_workers
    self._skips = SkipLog(len(source), on_skip)
    self._iterator = None
    self._end = None
    # Grain shuffles epoch k with seed + k, so that runs with neighbouring
    # seeds would share their orders; mixing keeps them apart.
    shuffle_seed, crop_seed = np.random.SeedSequence(seed).generate_state(2)
    used = self.steps_per_epoch * batch_size
    self._batches = (
      grain.MapDataset.range(len(source))
      .shuffle(seed=int(shuffle_seed))
      .random_map(
        LoadImage(source, image_size, crop, crop_scale), seed=int(crop_seed)
      )[:used]
      .batch(self._local_size)[process_index::process_count]
      .repeat()
    )

  @property
  def skipped(self) -> int:
    """Number of different records found corrupt so far."""
    return self._skips.count

  def seek(self, position):
    """Makes the batch at `position` the next one; see `TrainLoader`."""
    super().seek(position)
    self._stop()

  def __next__(self):
    try:
      if self._iterator is None:
        batch = self._first()
      else:
        batch = next(self._iterator)
    except Exception as error:
      self._stop()  # else Grain would end the epoch without a word
      if 'terminated unexpectedly' not in str(error):
        raise
      raise ChildProcessError(
        f'a data worker died ({error}); it may have run out of memory or of '
        f'/dev/shm: lower data.num_workers (now {self._workers}) or '
        'batch_size; the same command goes on from the last checkpoint'
      ) from error
    self._step += 1
    for index in np.unique(batch['bad']):
      if index != _NOTHING:
        self._report(int(index))
    # A copy, because the workers' shared memory must not outlive them.
    return {'image': np.array(batch['image'])}

  def _report(self, index: int) -> None:
    """Names a record that a worker found corrupt."""
    _, name, reason = try_image(self._source, index, lambda image: image)
    self._skips.add(index, name, reason or 'could not be read at first')

  def _first(self):
    """Starts the threads or workers and returns the batch of this step."""
    if self._workers == 0:
      self._iterator = self._start()
      return next(self._iterator)
    with _signals_held():
      self._iterator = self._start()
      # Python ends forgotten workers with SIGTERM, and waits for them.
      self._end = weakref.finalize(self, self._iterator.close)
      return next(self._iterator)

  def _start(self):
    """Makes the iterator that begins at the current step."""
    remaining = self._batches[self._step :]
    if self._workers == 0:
      threads = min(os.cpu_count() or 1, _MAX_THREADS)
      return iter(
        remaining.to_iter_dataset(
          grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
      )
    # Worker processes inherit absl's flags, which only absl apps parse.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    return iter(
      remaining.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
      ).mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=2
        ),
        worker_init_fn=_obey_parent,
      )
    )

  def _stop(self) -> None:
    """Ends the threads or workers."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None
    if self._end is not None:
      self._end.detach()
      self._end = None

  def close(self):
    """Ends the threads or workers."""
    self._stop()
