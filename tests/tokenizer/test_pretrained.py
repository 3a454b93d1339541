"""The tokenizers that come with the package."""

import numpy as np
import pytest
from PIL import Image

from rvq_jax import load, metrics
from rvq_jax.data.photos import PHOTOGRAPHS, photograph
from rvq_jax.tokenizer.load import pretrained


@pytest.mark.parametrize(
  ('name', 'side', 'least'), [('tiny_f8', 8, 19.5), ('tiny_f4', 16, 24)]
)
def test_photographs_come_back(name, side, least):
  names = [x for part in PHOTOGRAPHS.values() for x in part]
  squares = [
    Image.fromarray(photograph(x)).crop((90, 0, 340, 250)) for x in names
  ]
  images = np.stack([np.asarray(x.resize((64, 64))) for x in squares])
  tokenizer = load(f'pretrained:{name}')
  ids = tokenizer.encode(images)
  assert ids.shape == (len(images), side, side)
  assert len(np.unique(ids)) > 0.5 * ids.size  # of 4,096 codes
  decoded = np.asarray(metrics.to_uint8(tokenizer.decode(ids)))
  assert np.mean(metrics.psnr(images, decoded)) > least
  files = [x.stat().st_size for x in pretrained(name).iterdir()]
  assert sum(files) <= 4e6
