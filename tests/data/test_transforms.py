"""Crops on the host, scale and flips on the device."""

import jax
import numpy as np
import pytest
from tiny_data import noise

from rvq_jax.data.images import random_colors, random_flip, to_float
from rvq_jax.data.transforms import (
  random_crop,
  random_resized_crop,
  resize_and_center_crop,
)
from rvq_jax.metrics import to_uint8


def _ramp(height, width):
  """Red is the column, green the row: a crop says where it came from."""
  rows, columns = np.mgrid[:height, :width].astype(np.uint8)
  return np.stack([columns, rows, np.zeros_like(rows)], -1)


def test_the_scale_of_the_model_is_that_of_bytes():
  x = np.arange(256, dtype=np.uint8)
  y = to_float(x)
  assert (y.dtype, float(y.min()), float(y.max())) == (np.float32, -1, 1)
  np.testing.assert_array_equal(to_uint8(y), x)
  y = to_uint8(np.array([-7.0, 7.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1]))
  np.testing.assert_array_equal(y, [0, 255, 1, 0])


def test_flip_mirrors_some_images_and_leaves_the_others():
  images = np.stack([noise(4, 6) + np.uint8(i) for i in range(64)])
  flipped = np.asarray(random_flip(jax.random.key(0), images))
  mirrored = 0
  for before, after in zip(images, flipped, strict=True):
    same = np.array_equal(before, after)
    assert same or np.array_equal(before[:, ::-1], after)
    mirrored += not same
  assert 16 < mirrored < 48


@pytest.fixture(scope='module')
def colored():
  """Images of low contrast, so that nothing is clipped, before and after."""
  images = np.random.default_rng(0).uniform(-0.2, 0.2, (64, 3, 5, 3))
  return images, np.float64(random_colors(jax.random.key(0), images))


def test_colors_turn_only_about_the_grey_axis(colored):
  contrasts = set()
  for before, after in zip(*colored, strict=True):
    grey, grey_after = before.mean(-1), after.mean(-1)
    centred = grey - grey.mean()
    contrast = np.vdot(grey_after - grey.mean(), centred) / (centred**2).sum()
    np.testing.assert_allclose(
      grey_after - grey.mean(), contrast * centred, atol=1e-6
    )
    color, turned = before - grey[..., None], after - grey_after[..., None]
    ratio = (turned**2).sum() / (color**2).sum()
    norms = np.linalg.norm(turned, axis=-1) / np.linalg.norm(color, axis=-1)
    np.testing.assert_allclose(norms, np.sqrt(ratio), rtol=1e-4)
    assert 2**-0.5 <= contrast <= 2**0.5
    assert 2**-1.5 <= np.sqrt(ratio) / contrast <= 2**0.5
    contrasts.add(round(contrast, 3))
  assert len(contrasts) > 32


def test_colors_go_round_in_both_directions(colored):
  """Hue falls in each quarter of the circle, of both orientations."""
  basis = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]) / 6**0.5
  seen = set()
  for before, after in zip(*colored, strict=True):
    a, b = (x.reshape(-1, 3) @ basis.T @ [1, 1j] for x in (before, after))
    turned, mirrored = np.vdot(a, b), np.vdot(a.conj(), b)
    main = max(turned, mirrored, key=abs)
    quarter = int(np.angle(main) // (np.pi / 2))
    seen.add((bool(abs(turned) > abs(mirrored)), quarter))
  assert len(seen) == 8


def test_other_colors_stay_on_the_scale_of_the_model():
  images = np.random.default_rng(1).uniform(-1, 1, (8, 4, 4, 3))
  colored = np.asarray(random_colors(jax.random.key(1), images))
  assert colored.min() == -1 and colored.max() == 1


def test_an_image_that_has_the_size_is_only_cut():
  image, wide = noise(32, 32), noise(20, 33)
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(resize_and_center_crop(image, 32), image)
  np.testing.assert_array_equal(random_crop(image, 32, rng), image)
  np.testing.assert_array_equal(resize_and_center_crop(wide, 20), wide[:, 6:26])


def test_center_crop_shrinks_with_antialiasing():
  """A one-pixel checkerboard must become grey, not a moire."""
  board = np.indices((64, 64)).sum(0) % 2 * 255
  image = np.repeat(board[..., None], 3, -1).astype(np.uint8)
  small = resize_and_center_crop(image, 16)
  assert small.shape == (16, 16, 3)
  assert np.abs(small.astype(int) - 127).max() < 12


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (7, 200)])
def test_every_crop_gives_the_size_asked_for(shape):
  image, rng = noise(*shape), np.random.default_rng(0)
  assert resize_and_center_crop(image, 8).shape == (8, 8, 3)
  assert random_crop(image, 8, rng).shape == (8, 8, 3)
  assert random_resized_crop(image, 8, rng).shape == (8, 8, 3)


def test_random_crop_reaches_both_ends_of_the_longer_side():
  image, rng = _ramp(10, 14), np.random.default_rng(0)
  lefts = {int(random_crop(image, 10, rng)[0, 0, 0]) for _ in range(200)}
  assert lefts == {0, 1, 2, 3, 4}


def test_random_resized_crop_takes_the_share_of_area_asked_for():
  image, rng = _ramp(200, 200), np.random.default_rng(0)
  for _ in range(50):
    crop = random_resized_crop(image, 64, rng, scale=(0.2, 0.3)).astype(int)
    width = np.ptp(crop[..., 0]) + 1
    height = np.ptp(crop[..., 1]) + 1
    assert 0.17 < width * height / 200**2 < 0.33
    assert 0.7 < width / height < 1.42
