"""How steps reach the device: several in one call, batches or rows of a set.

A short step costs less than the host needs to start it. So one call may take
several steps (`lax.scan`), and a set that fits on the device may stay there, so
that only the numbers of its rows travel.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.data.loaders import MemoryLoader
from rvq_jax.training import sharding


def dispatch_size(step: int, most: int, end: int, *intervals: int) -> int:
  """Steps of the next call: `most`, or 1 where something is due inside.

  Calls of `most` steps start at multiples of `most` only, so that a run that
  was interrupted takes its steps in the same calls as one that was not.

  Args:
    step: steps taken.
    most: config.steps_per_dispatch.
    end: last step of the run.
    *intervals: a report, an evaluation or a checkpoint is due after each
      multiple of these; 0: never.

  Returns:
    `most` or 1.
  """
  after = step + most
  inside = any(
    every and after - 1 >= step // every * every + every for every in intervals
  )
  return 1 if step % most or after > end or inside else most


def scan_steps(train_step):
  """Makes train_step(state, batch) a function of batches [S, ...].

  Args:
    train_step: see `make_train_step`.

  Returns:
    (state, batches) -> the state after S steps, and their metrics: scalars
    [S], 'counts' summed over the steps.
  """

  def train_steps(state, batches):
    state, metrics = jax.lax.scan(train_step, state, batches)
    return state, metrics | {'counts': jnp.sum(metrics['counts'], axis=0)}

  return train_steps


class Feed:
  """The next batches, on the devices.

  Args:
    loader: a `TrainLoader`.
    mesh: from `data_mesh`.
    on_device: keep the whole set, uint8, on every device; batches are then
      {'row': [B]} instead of {'image': [B, h, w, 3]}.

  Attributes:
    images: the set on the devices [n, h, w, 3]; None without on_device.

  Raises:
    ValueError: on_device with a set that is streamed.
  """

  def __init__(self, loader, mesh, *, on_device: bool = False):
    self._loader, self._mesh = loader, mesh
    self.images = None
    self._waited = 0.0
    if on_device:
      if not isinstance(loader, MemoryLoader):
        raise ValueError(
          'config.data.on_device: expected False for a set that is streamed '
          "(data.in_memory = 'no', random crops, or more than 4 GiB), got True"
        )
      self.images = sharding.replicate(loader.images, mesh)

  def next(self, count: int, busy=None):
    """The batch of the next step, or batches [count, B, ...] of several.

    Args:
      count: steps.
      busy: an array that the last call computes. While it is not there the
        device has work, and what passes here is no waiting.

    Returns:
      A tree of global arrays.
    """
    start = time.monotonic()
    batches = [self._host_batch() for _ in range(count)]
    if count == 1:
      batch = sharding.shard_batch(batches[0], self._mesh)
    else:
      stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
      batch = sharding.shard_batch(stacked, self._mesh, axis=1)
    if busy is None or busy.is_ready():
      self._waited += time.monotonic() - start
    return batch

  def _host_batch(self):
    if self.images is None:
      return next(self._loader)
    return {'row': self._loader.next_indices().astype(np.int32)}

  def waited(self) -> float:
    """Seconds since the last call of this in which the device had no data.

    An upper bound: of a batch that came after the device was done, the whole
    time of its making.
    """
    waited, self._waited = self._waited, 0.0
    return waited
