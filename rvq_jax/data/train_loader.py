"""What every training loader does, wherever its images are kept."""

import abc

import numpy as np


class TrainLoader(abc.ABC):
  """Endless training batches that can be continued from any position.

  The batch of a step depends on the source, the seed and the global batch
  size only: not on what was read before, on the number of workers or on how
  many processes share it. So a position is the number of the next step, and the
  number of images tells whether it is one in the same set.

  Attributes:
    num_examples: images in one epoch's permutation, over all processes.
    steps_per_epoch: full global batches in an epoch; the rest is dropped, and
      it is another rest in every epoch.
  """

  def __init__(
    self,
    *,
    num_examples: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
      raise ValueError(
        'expected a positive global batch size that the number of processes '
        f'divides, got batch_size {batch_size} for {process_count} processes'
      )
    if not 0 <= process_index < process_count:
      raise ValueError(
        f'expected a process index from 0 to {process_count - 1}, got '
        f'{process_index}'
      )
    if num_examples < batch_size:
      raise ValueError(
        f'expected at least one batch of {batch_size} images, the training '
        f'split has {num_examples}; lower batch_size'
      )
    self.num_examples = num_examples
    self.steps_per_epoch = num_examples // batch_size
    self._batch_size = batch_size
    self._local_size = batch_size // process_count
    self._process_index = process_index
    self._process_count = process_count
    self._step = 0

  def position(self) -> dict[str, int]:
    """Returns what `seek` needs to continue with the next batch."""
    return {'step': self._step, 'images': self.num_examples}

  def seek(self, position: dict[str, int]) -> None:
    """Makes the batch at `position` the next one.

    Args:
      position: from `position()`, also of another run with other workers.
        'images' may be left out; it is then not compared.

    Raises:
      ValueError: if it is not a position, or one in another set of images.
    """
    step = position.get('step') if isinstance(position, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
      raise ValueError(
        "expected a position such as {'step': 0}, as position() returns it, "
        f'got {position!r}'
      )
    images = position.get('images', self.num_examples)
    if images != self.num_examples:
      raise ValueError(
        f'the training set has {self.num_examples} images that can be used, '
        f'and had {images} at this position: the batches that follow would be '
        'others; put the data set back as it was, or start anew in another '
        '--workdir'
      )
    self._step = step

  @property
  @abc.abstractmethod
  def skipped(self) -> int:
    """Number of different records that could not be decoded so far."""

  @abc.abstractmethod
  def __next__(self) -> dict[str, np.ndarray]:
    """Returns this process's rows of the next batch.

    Returns:
      {'image': uint8 [batch_size / process_count, size, size, 3]}.
    """

  def __iter__(self):
    return self

  def close(self) -> None:  # noqa: B027, most loaders have nothing to free
    """Frees threads and processes; the loader cannot be used afterwards."""
