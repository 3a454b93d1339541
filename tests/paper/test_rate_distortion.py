"""Rate and distortion against closed forms, np.cov and plain loops."""

import io
import itertools

import numpy as np
import pytest
from errors import one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rvq_jax.paper.rate_distortion import (
  GaussianBound,
  codec_points,
  gaussian_bound,
)


def noise(count=50, side=4):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, side, side, 3), np.uint8)


def smooth(count=4, side=24):
  pictures = map(Image.fromarray, noise(count))
  return np.stack([x.resize((side, side), Image.BICUBIC) for x in pictures])


def batches(images, mask=None, size=16):
  mask = np.ones(len(images), bool) if mask is None else mask
  for i in range(0, len(images), size):
    yield {'image': images[i : i + size], 'mask': mask[i : i + size]}


def bound(images, **options):
  side = images.shape[1]
  return gaussian_bound(batches(images), image_size=side, **options)


def oracle(images, side):
  """Eigenvalues of the covariance of tiles."""
  starts = range(0, images.shape[1], side)
  tiles = [
    image[i : i + side, j : j + side].ravel()
    for image, i, j in itertools.product(images, starts, starts)
  ]
  x = np.array(tiles, np.float64) / 127.5 - 1
  return np.linalg.eigvalsh(np.cov(x, rowvar=False, bias=True))


def curve(eigenvalues, bits, tiles=1):
  return GaussianBound(eigenvalues, tiles=tiles).mse(bits)


@pytest.mark.parametrize(
  ('images', 'limit', 'side'),
  [
    (noise(), 32, 4),
    (noise(side=6), 2, 2),
    (noise(side=12), 5, 4),
    (254 + noise(200) // 255, 4, 4),
  ],
  ids=['whole', 'tiles', 'largest that divides', 'nearly constant'],
)
def test_eigenvalues_are_those_of_numpys_covariance(images, limit, side):
  got, count = bound(images, max_side=limit), images.shape[1] // side
  assert (got.patch, got.tiles, got.images) == (side, count**2, len(images))
  want = oracle(images, side)
  np.testing.assert_allclose(got.eigenvalues, want, atol=1e-5 * want.max())


def test_valid_rows_are_read_up_to_a_maximum_and_no_further():
  images, mask = noise(), np.arange(50) % 3 > 0
  mask[:16] = False  # a first batch without any image
  stream = batches(images, mask)
  got = gaussian_bound(stream, image_size=4, max_images=12)
  assert got.images == 12
  want = oracle(images[mask][:12], 4)
  np.testing.assert_allclose(got.eigenvalues, want, atol=1e-6)
  np.testing.assert_array_equal(next(stream)['image'], images[48:])


def test_a_set_without_images_is_refused():
  with one_line('at least one valid image'):
    bound(noise(0))


@pytest.mark.parametrize(
  ('values', 'bits', 'want'),
  [
    # Variances 4 and 1: only the first is coded down to theta = 1, which takes
    # 1 bit; from then on each bit halves theta.
    ([1, 4], [0, 0.5, 1, 2, 5], [2.5, (2 + 1) / 2, 1, 0.5, 1 / 16]),
    ([-1e-9, 0, 2, 4], [0, 1000], [1.5, 0]),
    ([0], [0, 5], [0, 0]),
  ],
)
def test_curves_by_hand(values, bits, want):
  np.testing.assert_allclose(curve(values, bits), want, atol=1e-12)


variances = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12)


@given(variances, st.floats(1e-4, 1))
def test_curve_inverts_the_rate_at_a_water_level(values, level):
  values = np.array(values)
  theta = level * values.max()
  bits = np.maximum(0, 0.5 * np.log2(values / theta)).sum()
  got = curve(values, [bits])
  np.testing.assert_allclose(got, np.minimum(values, theta).mean(), rtol=1e-6)


def test_tiles_share_the_bits():
  values, bits = np.array([1.0, 3.0, 0.2]), [0, 6, 40]
  got, whole = curve(values, bits, tiles=4), curve(np.tile(values, 4), bits)
  np.testing.assert_allclose(got, whole, rtol=1e-9)


def test_patches_lie_higher_where_tiles_are_correlated():
  images, bits = noise(20000), [0, 10, 100]
  whole, tiled = bound(images), bound(images, max_side=2)
  np.testing.assert_allclose(tiled.mse(bits), whole.mse(bits), rtol=0.02)
  images, bits = smooth(500, 8), [20, 80]
  whole, tiled = bound(images), bound(images, max_side=4)
  assert (tiled.mse(bits) > 1.03 * whole.mse(bits)).all()


def test_codec_points_equal_a_plain_loop():
  images, bits, error = smooth(), [], []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=50)
    bits.append(8 * len(file.getvalue()))
    back = np.asarray(Image.open(file))
    error.append(np.mean((back / 127.5 - image / 127.5) ** 2))
  low, got = codec_points(images, formats=('JPEG',), qualities=(5, 50))
  assert (got['codec'], low['quality'], got['quality']) == ('JPEG', 5, 50)
  np.testing.assert_allclose(got['bits_per_image'], np.mean(bits))
  np.testing.assert_allclose(got['mse'], np.mean(error))
  assert 0 < got['overhead_bits'] < min(bits)


def test_formats_that_pillow_cannot_write_are_left_out():
  images = np.zeros((1, 8, 2**14, 3), np.uint8)  # WebP takes fewer pixels
  formats = 'NO_SUCH', 'JPEG', 'WEBP'
  points = codec_points(images, formats=formats, qualities=(50,))
  assert [record['codec'] for record in points] == ['JPEG']
