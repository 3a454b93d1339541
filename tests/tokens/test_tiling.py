"""Images of any size to ids and back."""

import numpy as np
import pytest

from rvq_jax.metrics import to_uint8
from rvq_jax.tokens import tiling


@pytest.mark.parametrize('size', [1, 63, 64, 65, 100, 112, 113, 500])
def test_windows_give_each_position_once_and_from_well_inside(size):
  given = []
  for start, first, last in tiling.spans(size):
    assert 0 <= start and start + min(size, tiling.WINDOW) <= size
    given += range(first, last)
    if start:
      assert first - start >= tiling.HALO
    if start + tiling.WINDOW < size:
      assert start + tiling.WINDOW - last >= tiling.HALO
  assert given == list(range(size))


@pytest.mark.parametrize('fields', [{}, {'quantizer': 'residual', 'depth': 3}])
def test_an_image_in_one_piece_is_the_reconstruction_to_the_byte(
  make_tokenizer, photograph, fields
):
  tokenizer = make_tokenizer(**fields)
  images = photograph(24, 36)[None]
  np.testing.assert_array_equal(
    tiling.encode_images(tokenizer, images), tokenizer.encode(images)
  )
  np.testing.assert_array_equal(
    tiling.reconstruct_images(tokenizer, images),
    to_uint8(tokenizer.reconstruct(images)),
  )


def test_an_odd_size_is_padded_by_its_last_pixels_and_cropped_back(
  make_tokenizer, photograph
):
  tokenizer = make_tokenizer()
  image = photograph(21, 34)
  padded = image[np.minimum(np.arange(24), 20)]
  padded = padded[:, np.minimum(np.arange(36), 33)]
  np.testing.assert_array_equal(
    tiling.reconstruct_images(tokenizer, image[None])[0],
    to_uint8(tokenizer.reconstruct(padded[None]))[0, :21, :34],
  )


def test_a_large_image_is_coded_in_windows_with_one_id_a_position(
  make_tokenizer, photograph, monkeypatch
):
  monkeypatch.setattr(tiling, 'WINDOW', 8)
  monkeypatch.setattr(tiling, 'HALO', 2)
  tokenizer = make_tokenizer()
  image = photograph(61, 90)
  ids = tiling.encode_images(tokenizer, image[None])
  assert ids.shape == (1, 16, 23)
  padded = tiling.pad_to_factor(image[None], 4)
  # The first window begins in the corner and gives all but its halo.
  corner = np.asarray(tokenizer.encode(padded[:, :32, :32]))
  np.testing.assert_array_equal(ids[:, :6, :6], corner[:, :6, :6])
  made = tiling.decode_ids(tokenizer, ids, 61, 90)
  assert made.shape == (1, 61, 90, 3)
  corner = to_uint8(tokenizer.decode(ids[:, :8, :8]))
  np.testing.assert_array_equal(made[:, :24, :24], corner[:, :24, :24])
  last = to_uint8(tokenizer.decode(ids[:, -8:, -8:]))
  np.testing.assert_array_equal(made[:, -10:, -10:], last[:, 19:29, 20:30])


def test_a_large_image_shows_how_far_it_is(
  make_tokenizer, photograph, monkeypatch, caplog
):
  monkeypatch.setattr(tiling, 'WINDOW', 8)
  monkeypatch.setattr(tiling, 'HALO', 2)
  bars = []

  class Bar(tiling.tqdm):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options | {'disable': False})
      bars.append(self)

  monkeypatch.setattr(tiling, 'tqdm', Bar)
  tokenizer, image = make_tokenizer(), photograph(61, 90)
  ids = tiling.encode_images(tokenizer, image[None], desc='encode')
  tiling.decode_ids(tokenizer, ids, 61, 90, desc='decode')
  # 16 and 23 positions, of which each window but the outer ones gives 4.
  assert [(bar.desc, bar.n) for bar in bars] == [('encode', 15), ('decode', 15)]
  assert caplog.text == ''


def test_without_a_terminal_a_line_says_how_much_there_is(
  make_tokenizer, photograph, monkeypatch, caplog
):
  monkeypatch.setattr(tiling, 'WINDOW', 8)
  monkeypatch.setattr(tiling, 'HALO', 2)
  tokenizer = make_tokenizer()
  with caplog.at_level('INFO'):
    tiling.encode_images(tokenizer, photograph(61, 90)[None], desc='encode')
    tiling.encode_images(tokenizer, photograph(61, 90)[None])
    tiling.encode_images(tokenizer, photograph(32, 32)[None], desc='small')
  assert caplog.messages == ['encode: 15 windows of 8 x 8 tokens']
