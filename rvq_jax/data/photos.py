"""The embedded data set: crops of photographs that ship with our dependencies.

All but one come with scikit-image (public domain or CC0), Grace Hopper with
matplotlib (US Navy, public domain). Crops of one photograph overlap, so
training and test images come from different photographs.
"""

import functools
import io

import numpy as np
import skimage.data
from PIL import Image

from rvq_jax.data.sources import Record, Source
from rvq_jax.data.splits import hashed_order, seeded_rng
from rvq_jax.data.transforms import random_resized_crop

PHOTOGRAPHS = {
  'train': ('astronaut', 'coffee', 'grace_hopper', 'rocket'),
  'test': ('chelsea',),
}
COUNTS = {'train': 4000, 'test': 400}
SIZE = 64  # pixels
_LABELS = tuple(sorted(sum(PHOTOGRAPHS.values(), ())))
_SEED = 20240229
# From about 64 pixels across, pure texture, to most of a photograph.
_SCALE = (0.03, 0.8)


@functools.cache
def photograph(name: str) -> np.ndarray:
  """A photograph in `PHOTOGRAPHS`, uint8 [h, w, 3]."""
  if name == 'grace_hopper':
    from matplotlib import cbook  # slow to import

    with cbook.get_sample_data('grace_hopper.jpg') as file:
      return np.asarray(Image.open(file))
  return getattr(skimage.data, name)()


class PhotoSource(Source):
  """Crops that depend only on the split and their number."""

  def __init__(self, split: str):
    self._split = split
    self._order = hashed_order(split, range(COUNTS[split]))
    names = PHOTOGRAPHS[split]
    self._names = [names[i % len(names)] for i in self._order]
    self.labels = np.array([*map(_LABELS.index, self._names)], np.int32)

  def __len__(self):
    return len(self._order)

  def __getitem__(self, index):
    number, name = self._order[index], self._names[index]
    rng = seeded_rng(_SEED, list(PHOTOGRAPHS).index(self._split), number)
    crop = random_resized_crop(photograph(name), SIZE, rng, scale=_SCALE)
    if rng.random() < 0.5:
      crop = crop[:, ::-1]
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop)).save(data, 'BMP')
    name = f'{self._split}_{number:05d}'
    return Record(data.getvalue(), int(self.labels[index]), name)

  def identity(self):
    """See `Source`."""
    return ['photos', self._split]
