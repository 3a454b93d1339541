"""The embedded data set: crops of photographs that ship with scikit-image.

It needs no download and lets a small model learn within two minutes. Training
and test images come from different photographs: crops of one photograph
overlap, so a split by crop would test on training pixels.
"""

import io

import numpy as np
import skimage.data
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data.builders import Examples, Recipe
from rvq_jax.data.splits import seeded_rng
from rvq_jax.data.transforms import random_resized_crop

SIZE = 64
"""Side of a stored crop in pixels."""

PHOTOGRAPHS = {
  'train': ('astronaut', 'coffee', 'rocket'),
  'test': ('chelsea',),
}
_NAMES = ('astronaut', 'chelsea', 'coffee', 'rocket')
_COUNTS = {'train': 4000, 'test': 400}
_SEED = 20240229
# From about 64 pixels across, nothing but texture, to most of a photograph.
_SCALE = (0.03, 0.8)


def make_recipe(counts: dict[str, int] | None = None) -> Recipe:
  """Makes the recipe of the photographs.

  Args:
    counts: number of crops per split; None for 4000 train and 400 test.

  Returns:
    The recipe of photos/1.0.0.
  """
  counts = counts or _COUNTS
  return Recipe(
    name='photos',
    version='1.0.0',
    description=f'{SIZE} x {SIZE} crops of photographs in scikit-image.',
    homepage='https://scikit-image.org/docs/stable/api/skimage.data.html',
    num_shards=1,
    features=_features,
    splits=lambda _: {split: _crops(split, counts[split]) for split in counts},
  )


def _features() -> tfds.features.FeaturesDict:
  """Returns the features; the label says which photograph it is."""
  return tfds.features.FeaturesDict(
    {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(shape=(SIZE, SIZE, 3)),
      'label': tfds.features.ClassLabel(names=list(_NAMES)),
    }
  )


def _crops(split: str, count: int) -> Examples:
  """Opens one split; crop i depends on the split and on i only."""
  names = PHOTOGRAPHS[split]
  photographs = {name: getattr(skimage.data, name)() for name in names}

  def read(i: int) -> dict[str, object]:
    """Takes crop i; the photographs take turns."""
    name = names[i % len(names)]
    rng = seeded_rng(_SEED, list(PHOTOGRAPHS).index(split), i)
    crop = random_resized_crop(photographs[name], SIZE, rng, scale=_SCALE)
    if rng.random() < 0.5:
      crop = crop[:, ::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop)).save(
      buffer, 'PNG', compress_level=1
    )
    return {
      'id': f'{split}_{i:05d}',
      'image': buffer.getvalue(),
      'label': _NAMES.index(name),
    }

  return Examples(range(count), read)


RECIPE = make_recipe()
