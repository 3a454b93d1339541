"""Images of any size to ids and back, and as one file."""

import copy
from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line

from rvq_jax import sharding
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer import tiling

VQGAN = {'network': 'vqgan', 'ch': 4, 'ch_mult': (1, 1), 'factor': 2}
VQGAN |= {'num_res_blocks': 0, 'z_channels': 4, 'attn_levels': (1, 2)}


def reconstruct(tokenizer, image):
  ids = tiling.encode_images(tokenizer, image[None])
  return tiling.decode_ids(tokenizer, ids, *image.shape[:2])[0]


@pytest.mark.parametrize('size', [1, 63, 64, 65, 100, 112, 113, 500])
def test_windows_keep_each_position_once_and_from_well_inside(size):
  kept = []
  for start, first, last in tiling.spans(size, 64, 8):
    assert 0 <= start and start + min(size, 64) <= size
    kept += range(first, last)
    if start:
      assert first - start >= 8
    if start + 64 < size:
      assert start + 64 - last >= 8
  assert kept == list(range(size))


@pytest.mark.parametrize(
  ('quantizer', 'height', 'width', 'shape'),
  [
    ('vq', 21, 34, (6, 9)),
    ('residual', 21, 34, (6, 9, 4)),
    ('multiscale', 15, 14, (26,)),
  ],
)
def test_an_image_is_padded_by_its_last_pixels_and_equals_the_tokenizer(
  make_tokenizer, photograph, quantizer, height, width, shape
):
  tokenizer = make_tokenizer(quantizer=quantizer)
  image = photograph(height, width)
  rows, columns = np.arange(-(-height // 4) * 4), np.arange(-(-width // 4) * 4)
  padded = image[rows.clip(max=height - 1)][:, columns.clip(max=width - 1)]
  ids = tiling.encode_images(tokenizer, image[None])
  assert ids.shape == (1, *shape) and ids.dtype == np.uint8
  np.testing.assert_array_equal(ids, tokenizer.encode(padded[None]))
  whole = to_uint8(tokenizer.reconstruct(padded[None]))[0]
  np.testing.assert_array_equal(
    reconstruct(tokenizer, image), whole[:height, :width]
  )


def test_multi_scale_tokens_are_those_of_one_size(make_tokenizer, photograph):
  with one_line('images of one size: resize or crop'):
    reconstruct(make_tokenizer(quantizer='multiscale'), photograph(21, 21))


@pytest.mark.parametrize(('side', 'windows'), [(64, 0), (65, 1)])
def test_64_positions_are_one_piece(make_tokenizer, side, windows):
  tokenizer = make_tokenizer()
  image = np.zeros((1, side * 4, 4, 3), np.uint8)
  with mock.patch.object(
    tiling, '_by_windows', wraps=tiling._by_windows
  ) as by_windows:
    ids = tiling.encode_images(tokenizer, image)
    tiling.decode_ids(tokenizer, ids, side * 4, 4)
  assert by_windows.call_count == 2 * windows


@pytest.fixture
def make_active(make_tokenizer):
  """Returns a function: model fields -> a tokenizer whose norms all count."""

  def make(**fields):
    tokenizer = copy.copy(make_tokenizer(**fields))
    rng = np.random.default_rng(0)
    tokenizer.variables = jax.tree_util.tree_map_with_path(
      lambda path, x: (
        rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
        if path[-1].key in ('scale', 'var')
        else x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
        if path[-1].key == 'kernel' and not np.any(x)
        else x
      ),
      tokenizer.variables,
    )
    return tokenizer

  return make


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'norm': 'group', 'num_res_blocks': 1, 'remat': True},
    pytest.param(VQGAN, marks=pytest.mark.slow),
    pytest.param(
      {'norm': 'group', 'factor': 2, 'quantizer': 'residual'},
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_windows_give_the_ids_and_the_picture_of_one_piece(
  make_active, photograph, monkeypatch, fields
):
  tokenizer, f = make_active(**fields), fields.get('factor', 4)
  rows = 38 if tokenizer.model.encoder.reach < 9 else 60  # two windows
  images = np.stack([photograph(rows * f, 35 * f, seed) for seed in (0, 1)])
  images[:, : 16 * f] //= 4  # parts of an image have other statistics
  monkeypatch.setattr(tiling, 'WINDOW', 8)
  monkeypatch.setattr(tiling, 'HALO', 0)
  monkeypatch.setattr(tiling, 'PIECE', 0)
  two = sharding.by_rows(sharding.data_mesh(jax.devices()[:2]))
  ids = tiling.encode_images(tokenizer, images, placement=two)
  np.testing.assert_array_equal(ids, tokenizer.encode(images))
  whole = np.asarray(to_uint8(tokenizer.decode(ids)), int)
  made = tiling.decode_ids(tokenizer, ids, *images.shape[1:3])
  assert np.abs(made - whole).max() <= 1 < np.ptp(whole)


def test_group_norm_sees_an_image_of_a_million_pixels_whole(
  make_active, photograph, monkeypatch
):
  monkeypatch.setattr(tiling, '_by_windows', None)
  tokenizer, image = make_active(norm='group'), photograph(8, 4 * 66)[None]
  ids = tiling.encode_images(tokenizer, image)
  np.testing.assert_array_equal(ids, tokenizer.encode(image))
  tiling.decode_ids(tokenizer, ids, 8, 4 * 66)
  assert tiling.PIECE == 2**20
  monkeypatch.setattr(tiling, 'PIECE', 8 * 4 * 66 - 1)
  with pytest.raises(TypeError, match='NoneType'):
    tiling.encode_images(tokenizer, image)


def test_more_positions_than_keys_show_no_seams(
  make_active, photograph, monkeypatch
):
  tokenizer, made = make_active(norm='group'), []
  ids = tokenizer.encode(photograph(37 * 4, 41 * 4)[None])
  whole = np.asarray(to_uint8(tokenizer.decode(ids)), int)
  monkeypatch.setattr(tiling, 'KEYS', 500)
  monkeypatch.setattr(tiling, 'PIECE', 0)
  for window in (8, 20):
    monkeypatch.setattr(tiling, 'WINDOW', window)
    made.append(tiling.decode_ids(tokenizer, ids, 148, 164).astype(int))
  assert np.abs(made[0] - made[1]).max() <= 1
  assert 0 < np.abs(made[0] - whole).mean() < 2


@pytest.mark.parametrize(
  ('quantizer', 'size', 'dtype', 'shape'),
  [('vq', 256, np.uint8, (6, 8)), ('product', 257, np.uint16, (6, 8, 2))],
)
def test_a_file_holds_the_reconstruction(
  make_tokenizer, photograph, quantizer, size, dtype, shape, tmp_path
):
  tokenizer = make_tokenizer(quantizer=quantizer, codebook_size=size)
  image, path = photograph(21, 30), tmp_path / 'x.npz'
  tiling.save_image(tokenizer, image, path)
  about = {'size': [21, 30], 'codebook_size': size, 'factor': 4}
  about |= {n: getattr(tokenizer, n) for n in ('model_hash', 'encoder_hash')}
  with np.load(path, allow_pickle=False) as arrays:
    assert (arrays['ids'].dtype, arrays['ids'].shape) == (dtype, shape)
    assert {name: arrays[name].tolist() for name in about} == about
  np.testing.assert_array_equal(
    tiling.load_image(tokenizer, path), reconstruct(tokenizer, image)
  )


@pytest.fixture
def saved(make_tokenizer, photograph, tmp_path):
  """A tokenizer and the file of an image of 16 x 16 pixels."""
  tokenizer = make_tokenizer()
  tiling.save_image(tokenizer, photograph(16, 16), tmp_path / 'x.npz')
  return tokenizer, tmp_path / 'x.npz'


LIES = [np.full((4, 4), 16, np.uint8), np.zeros((4, 4)), np.zeros((4, 3), 'u1')]
LIES = [('ids', ids) for ids in (*LIES, np.zeros((4, 4), int), np.array([{}]))]
LIES += [('size', [2**30, 2**30]), ('size', [-1, -1]), ('size', [16])]


@pytest.mark.parametrize(('name', 'value'), [*LIES, ('encoder_hash', None)])
def test_a_file_that_lies_is_refused(saved, name, value):
  tokenizer, path = saved
  with np.load(path) as arrays:
    content = dict(arrays) | {name: value}
  np.savez(path, **{k: v for k, v in content.items() if v is not None})
  with one_line('x.npz: expected|x.npz is damaged|expected ids from 0 to 15'):
    tiling.load_image(tokenizer, path)


def test_a_damaged_or_foreign_file_is_refused(saved, make_tokenizer, tmp_path):
  tokenizer, path = saved
  with one_line('expected the encoder .*, got '):
    tiling.load_image(make_tokenizer(seed=2), path)
  whole = path.read_bytes()
  ids = whole.index(b'ids.npy') + 160  # behind the headers, among the ids
  flipped = bytearray(whole)
  flipped[ids] ^= 4
  for content in (bytes(flipped), whole[:-30], whole[:90], b'', b'no zip'):
    path.write_bytes(content)
    with one_line('x.npz: expected an .npz file'):
      tiling.load_image(tokenizer, path)
  with one_line('y.npz: expected an .npz file'):
    tiling.load_image(tokenizer, tmp_path / 'y.npz')
