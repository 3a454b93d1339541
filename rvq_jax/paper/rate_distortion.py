"""Distortion against bits per image: two references for a tokenizer.

Image codecs, and the rate-distortion function of the Gaussian source with the
covariance of the data. MSE is on [-1, 1].
"""

import io
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)


class GaussianBound(NamedTuple):
  """Rate-distortion function of a Gaussian source with the data's covariance.

  The Gaussian is the hardest source with that covariance: its R(D) bounds the
  rate of the best code for the data from above, not from below. Tiles ignore
  the correlations between them, which raises the curve; too few images lower
  it.
  """

  eigenvalues: np.ndarray  # of the covariance of a tile, [P]; negative: 0
  patch: int = 1  # side of a tile in pixels
  tiles: int = 1  # independent tiles per image
  images: int = 0  # images behind the covariance

  def mse(self, bits_per_image) -> np.ndarray:
    """Least MSE at rates [n], float64: reverse water-filling.

    Components with a variance above the water level theta get the error theta,
    the others no bits (Cover and Thomas, theorem 10.3.3):

      D(theta) = mean_i min(theta, lambda_i)
      R(theta) = sum_i max(0, 1/2 log2(lambda_i / theta))

    Each tile gets an equal share of the bits.
    """
    values = np.clip(np.asarray(self.eigenvalues, np.float64), 0, None)
    positive = np.sort(values[values > 0])[::-1]
    bits = np.asarray(bits_per_image, np.float64) / self.tiles
    if not positive.size:
      return np.zeros(bits.shape)
    # With the k largest above the water, R = 1/2 sum_{i<=k} log2(lambda_i) -
    # k/2 log2(theta). `onset` is this rate at theta = lambda_k, where component
    # k gets its first bit; between two onsets theta has a closed form.
    count, logs = np.arange(1, positive.size + 1), np.log2(positive)
    sums = np.cumsum(logs)
    onset = np.maximum.accumulate(0.5 * (sums - count * logs))
    k = np.maximum(np.searchsorted(onset, bits, side='right'), 1)
    theta = np.exp2((sums[k - 1] - 2 * bits) / k)
    tail = np.append(np.cumsum(positive[::-1])[::-1], 0.0)
    return (k * theta + tail[k]) / values.size


def gaussian_bound(
  batches: Iterable, *, image_size: int, max_side=32, max_images=20000
) -> GaussianBound:
  """Measures the covariance (divided by n) of the pixels of square tiles.

  Args:
    batches: {'image': uint8 [B, h, h, 3], 'mask': bool [B], False: skipped};
      ValueError without any image.
    image_size: h.
    max_side: a tile's side is the largest divisor of h up to this.
    max_images: reads at most so many.
  """
  sides = range(min(image_size, max_side), 0, -1)
  patch = next(side for side in sides if image_size % side == 0)
  side = image_size // patch
  images = 0
  for batch in batches:
    image = batch['image'][batch['mask']][: max_images - images]
    if len(image):
      x = image.reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
      x = x.reshape(-1, 3 * patch**2).astype(np.float32) / 127.5 - 1
      if not images:
        # Moments about a point near the mean; moments about zero would cancel.
        offset = x.mean(0)
        first, second = np.zeros(x.shape[1]), np.zeros([x.shape[1]] * 2)
      x -= offset
      first += x.sum(0, dtype=np.float64)
      second += x.T @ x
      images += len(image)
    if images == max_images:
      break
  if not images:
    raise ValueError('expected at least one valid image, got none')
  mean, moment = (x / images / side**2 for x in (first, second))
  eigenvalues = np.linalg.eigvalsh(moment - np.outer(mean, mean))
  return GaussianBound(eigenvalues, patch, side**2, images)


def codec_points(
  images: np.ndarray, *, formats=('JPEG', 'WEBP'), qualities=QUALITIES
) -> list[dict[str, float | str]]:
  """Measures image codecs at several qualities, else with Pillow's defaults.

  Images, uint8 [n, h, w, 3], from JPEG files favour JPEG near their quality.
  Formats are Pillow's names; it skips formats that Pillow cannot write, such as
  WebP with a side above 16,383. Qualities are 0 to 100.

  Returns:
    Per format and quality: codec, quality, bits_per_image (of the file),
    overhead_bits (a grey image of that shape, nearly all header) and mse.
  """
  records, grey = [], np.full_like(images[0], 128)
  for codec, quality in itertools.product(formats, qualities):
    try:
      header, *files = (_encode(x, codec, quality) for x in (grey, *images))
    except (KeyError, OSError, ValueError):  # Pillow lacks it; too large
      continue
    decoded = [Image.open(io.BytesIO(file)).convert('RGB') for file in files]
    error = (np.stack(decoded) / 127.5 - images / 127.5) ** 2
    bits = float(np.mean([8 * len(file) for file in files]))
    record = {'codec': codec, 'quality': quality, 'bits_per_image': bits}
    record |= {'overhead_bits': 8 * len(header), 'mse': float(error.mean())}
    records.append(record)
  return records


def _encode(image: np.ndarray, codec: str, quality: int) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, format=codec, quality=quality)
  return file.getvalue()
