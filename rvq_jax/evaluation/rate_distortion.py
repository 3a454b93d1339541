"""Distortion against bits an image: what a given number of bits can buy.

Next to the points of a tokenizer stand two references: image codecs, measured
as files, and the rate-distortion function of the Gaussian source that has the
covariance of the data. MSE is on the model's scale [-1, 1] throughout.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)


def pixel_covariance(
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  patch: int | None = None,
  max_images: int | None = None,
) -> tuple[np.ndarray, int]:
  """Covariance of the pixels of flattened images, in one pass.

  Divided by n, not n - 1: its trace is the squared error of always answering
  with the mean.

  Args:
    batches: {'image': uint8 [B, h, w, 3], 'mask': bool [B]}, as `eval_batches`
      yields them; rows with mask False are left out.
    patch: side in pixels of non-overlapping square tiles, each of them then a
      sample; None for whole images.
    max_images: images after which to stop. They are the first ones: where the
      set is ordered by class, give a shuffled subset.

  Returns:
    The covariance of x / 127.5 - 1, float64 [P, P] with P = h w 3, or
    patch^2 3, and the number of images that it was computed from.

  Raises:
    ValueError: if there is no image, or `patch` does not divide the sides.
  """
  if max_images is not None and max_images < 1:
    raise ValueError(f'expected max_images >= 1 or None, got {max_images}')
  images = samples = 0
  for batch in batches:
    image = np.asarray(batch['image'])[np.asarray(batch['mask'], bool)]
    if max_images is not None:
      image = image[: max_images - images]
    if len(image):
      x = _samples(image, patch)
      if not images:
        # Moments about a point near the mean: those about zero would cancel.
        offset = x.mean(0)
        first = np.zeros(x.shape[1])
        second = np.zeros((x.shape[1], x.shape[1]))
      x -= offset
      first += x.sum(0, dtype=np.float64)
      second += x.T @ x
      images, samples = images + len(image), samples + len(x)
    if images == max_images:
      break
  if not images:
    raise ValueError(
      'expected batches with at least one image whose mask is True, got none'
    )
  first /= samples
  second /= samples
  second -= np.outer(first, first)
  return second, images


def _samples(image: np.ndarray, patch: int | None) -> np.ndarray:
  """Flattens images, or tiles of them, to float32 [samples, P] in [-1, 1]."""
  n, height, width, channels = image.shape
  if patch is not None:
    if patch < 1 or height % patch or width % patch:
      raise ValueError(
        f'expected a patch that divides the sides of the images, {height} x '
        f'{width}, got {patch}'
      )
    image = image.reshape(
      n, height // patch, patch, width // patch, patch, channels
    ).swapaxes(2, 3)
    height = width = patch
  flat = image.reshape(-1, height * width * channels)
  return flat.astype(np.float32) / np.float32(127.5) - 1


def gaussian_curve(eigenvalues, bits, *, tiles: int = 1) -> np.ndarray:
  """Least MSE of a Gaussian source at a rate: reverse water-filling.

  Components with a variance above the water level theta are coded with error
  theta, the others not at all (Cover and Thomas, theorem 10.3.3):

    D(theta) = mean_i min(theta, lambda_i)
    R(theta) = sum_i max(0, 1/2 log2(lambda_i / theta))

  Args:
    eigenvalues: of the covariance of one tile, [P]; negative ones are taken
      for zero.
    bits: bits an image, [n].
    tiles: independent tiles an image; each gets bits / tiles.

  Returns:
    MSE, float64 [n]; at 0 bits the mean of the eigenvalues.

  Raises:
    ValueError: if a rate is negative or there is no eigenvalue.
  """
  values = np.sort(np.clip(np.asarray(eigenvalues, np.float64), 0, None))[::-1]
  bits = np.asarray(bits, np.float64) / tiles
  if values.size == 0 or not (bits >= 0).all():
    raise ValueError(
      f'expected eigenvalues and bits >= 0, got {values.size} eigenvalues and '
      f'at least {bits.min(initial=0)} bits'
    )
  positive = values[values > 0]
  if positive.size == 0:
    return np.zeros(bits.shape)
  # With the k largest above the water, R = 1/2 sum_{i<=k} log2(lambda_i) -
  # k/2 log2(theta). `onset` is that rate at theta = lambda_k, where component
  # k begins to be coded; between two onsets theta follows in closed form.
  count = np.arange(1, positive.size + 1)
  logs = np.log2(positive)
  sums = np.cumsum(logs)
  onset = np.maximum.accumulate(0.5 * (sums - count * logs))
  k = np.maximum(np.searchsorted(onset, bits, side='right'), 1)
  theta = np.exp2((sums[k - 1] - 2 * bits) / k)
  tail = np.append(np.cumsum(positive[::-1])[::-1], 0.0)
  return (k * theta + tail[k]) / values.size


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianBound:
  """Rate-distortion function of a Gaussian source with the data's covariance.

  Of all sources with that covariance the Gaussian is the hardest to code: its
  R(D) is the highest. So it bounds from above what the best code for the data
  needs, and is NOT a lower bound: a code that knows more of images than their
  covariance, as every trained one does, may lie below the curve. How far below
  it a claimed point lies says how much more must be known.

  In patches, correlations between tiles are ignored, and the curve lies higher
  still. From too few images it lies too low, as they fit their own covariance:
  `images` times `tiles` should be several times the number of eigenvalues.

  Attributes:
    patch: side of a tile in pixels; the image's own where it is one tile.
    tiles: tiles an image.
    images: images that the covariance was computed from.
    eigenvalues: of the covariance of a tile in [-1, 1], ascending, [P].
  """

  patch: int
  tiles: int
  images: int
  eigenvalues: np.ndarray

  def mse(self, bits_per_image) -> np.ndarray:
    """Returns the MSE at these rates, [n]; see `gaussian_curve`."""
    return gaussian_curve(self.eigenvalues, bits_per_image, tiles=self.tiles)


def gaussian_bound(
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  image_size: int,
  max_side: int = 32,
  max_images: int | None = 20000,
) -> GaussianBound:
  """Measures the covariance of a set of images; see `GaussianBound`.

  Args:
    batches: as for `pixel_covariance`, of square images.
    image_size: side of the images in pixels.
    max_side: largest side of a tile in pixels; a larger image is divided into
      tiles of its largest divisor up to this.
    max_images: images after which to stop; None for all.

  Returns:
    A `GaussianBound`.

  Raises:
    ValueError: if there is no image, or a size is below 1.
  """
  if image_size < 1 or max_side < 1:
    raise ValueError(
      'expected image_size >= 1 and max_side >= 1, got '
      f'{image_size} and {max_side}'
    )
  sides = range(min(image_size, max_side), 0, -1)
  patch = next(side for side in sides if image_size % side == 0)
  covariance, images = pixel_covariance(
    batches, patch=patch, max_images=max_images
  )
  return GaussianBound(
    patch=patch,
    tiles=(image_size // patch) ** 2,
    images=images,
    eigenvalues=np.linalg.eigvalsh(covariance),
  )


def codec_points(
  images: np.ndarray,
  *,
  formats: Sequence[str] = ('JPEG', 'WEBP'),
  qualities: Sequence[int] = QUALITIES,
) -> list[dict[str, float | str]]:
  """Measures image codecs, with Pillow's defaults but for the quality.

  Images that once were JPEG files flatter JPEG near the quality they had:
  those of CIFAR-10 return almost unharmed at 75.

  Args:
    images: uint8 [n, h, w, 3].
    formats: Pillow's names; those that it cannot write are left out.
    qualities: 0 to 100.

  Returns:
    A record for each format and quality: codec; quality; bits_per_image, the
    mean size of the whole file, headers and tables too; overhead_bits, the size
    of a file of the same shape that is grey all over, nearly all of it header;
    mse on [-1, 1]; psnr in dB, the mean over images of 10 log10(255^2 / MSE)
    with equal images as in `metrics.psnr`.

  Raises:
    ValueError: if `images` is of another type or shape, or empty.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.shape[3:] != (3,) or not images.size:
    raise ValueError(
      'expected images uint8 [n, h, w, 3], n >= 1, got '
      f'{images.dtype} {list(images.shape)}'
    )
  records = []
  for codec in formats:
    try:
      _encode(images[0], codec, qualities[0])
    except (KeyError, OSError):  # unknown, or Pillow was built without it
      continue
    records += [_measure(images, codec, quality) for quality in qualities]
  return records


def _measure(images: np.ndarray, codec: str, quality: int) -> dict:
  """Codes images at one quality; see `codec_points`."""
  bits, error = [], []
  for image in images:
    file = _encode(image, codec, quality)
    with Image.open(io.BytesIO(file)) as decoded:
      got = np.asarray(decoded.convert('RGB'), np.float64)
    bits.append(8 * len(file))
    error.append(np.mean((got - image) ** 2))
  grey = _encode(np.full_like(images[0], 128), codec, quality)
  floor = 1.0 / images[0].size
  return {
    'codec': codec,
    'quality': quality,
    'bits_per_image': float(np.mean(bits)),
    'overhead_bits': 8 * len(grey),
    'mse': float(np.mean(error)) / 127.5**2,
    'psnr': float(np.mean(10 * np.log10(255**2 / np.maximum(error, floor)))),
  }


def _encode(image: np.ndarray, codec: str, quality: int) -> bytes:
  """Writes an image to memory."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, format=codec, quality=quality)
  return file.getvalue()
