"""The format .rvq, byte by byte."""

import dataclasses
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, features

from rvq_jax.tokens import codecs, files, packing, rvq_file
from rvq_jax.tokens.tiling import reconstruct_images

HEADER = '<4sBBBBHHHHI8s'
SMALL = rvq_file.TokenImage(
  ids=np.arange(6).reshape(2, 3, 1),
  height=7,
  width=10,
  factor=4,
  codebook_size=16,
  model_hash=bytes(range(8)),
)


def file(payload=b'\x01\x23\x45', **changed):
  """An .rvq file made by hand, after docs/formats.md."""
  fields = {
    'magic': b'\x89RVQ',
    'version': 1,
    'coding': 0,
    'codes': 1,
    'factor': 4,
    'height': 7,
    'width': 10,
    'rows': 2,
    'columns': 3,
    'codebook_size': 16,
    'model_hash': bytes(range(8)),
  }
  data = struct.pack(HEADER, *(fields | changed).values()) + payload
  return data + struct.pack('<I', zlib.crc32(data))


def test_a_file_is_what_the_document_says():
  assert rvq_file.to_bytes(SMALL) == file()


def test_a_file_is_read_as_it_was_written():
  got = rvq_file.from_bytes(file())
  np.testing.assert_array_equal(got.ids, SMALL.ids)
  assert (got.height, got.width, got.factor) == (7, 10, 4)
  assert (got.codebook_size, got.model_hash) == (16, bytes(range(8)))


def entropy_coded():
  """A file whose ids repeat, so that LZMA is the shorter coding."""
  ids = np.arange(1600).reshape(40, 40, 1) // 40 % 16
  return rvq_file.to_bytes(
    dataclasses.replace(SMALL, ids=ids, height=160, width=160)
  )


CODINGS = {0: file, 1: entropy_coded}


@pytest.mark.parametrize('coding', CODINGS)
def test_every_flipped_byte_is_detected(tmp_path, coding):
  whole, path = CODINGS[coding](), tmp_path / 'x.rvq'
  assert whole[5] == coding
  for i in range(len(whole)):
    for flip in (0x01, 0x80, 0xFF, 0x5A):
      damaged = bytearray(whole)
      damaged[i] ^= flip
      with pytest.raises(ValueError):
        rvq_file.from_bytes(bytes(damaged))
      path.write_bytes(damaged)
      with pytest.raises(ValueError, match='x.rvq'):
        rvq_file.read(path)


@pytest.mark.parametrize('coding', CODINGS)
def test_every_truncation_and_anything_behind_is_detected(coding):
  whole = CODINGS[coding]()
  for length in range(len(whole)):
    with pytest.raises(ValueError):
      rvq_file.from_bytes(whole[:length])
  with pytest.raises(ValueError):
    rvq_file.from_bytes(whole + b'\0')


def test_another_kind_of_file_is_called_so(tmp_path):
  path = tmp_path / 'x.png'
  files.write_image(path, np.zeros((40, 40, 3), np.uint8))
  with pytest.raises(ValueError, match='x.png: expected an .rvq file'):
    rvq_file.read(path)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'version': 2}, 'expected version 1 of the format, got 2'),
    ({'coding': 9}, 'coding 9'),
    ({'codes': 0}, 'of 0 codes'),
    ({'factor': 0}, 'factor 0'),
    ({'height': 0}, '10 x 0 pixels'),
    ({'rows': 3}, '3 x 3 positions'),
    ({'codebook_size': 0}, 'K = 0'),
    ({'codebook_size': 2**32 - 1}, 'K = 4294967295'),
    ({'codebook_size': 5}, 'expected 3 bytes|expected ids below 5|ids'),
    (
      {'height': 65535, 'width': 65535, 'rows': 16384, 'columns': 16384},
      'at most 67108864 pixels',
    ),
    (
      {'height': 8192, 'width': 8192, 'rows': 2048, 'columns': 2048}
      | {'codes': 255},
      'at most 67108864 pixels and 16777216 ids',
    ),
  ],
)
def test_a_header_that_cannot_be_is_refused_in_little_memory(
  changed, message, tmp_path
):
  path = tmp_path / 'x.rvq'
  path.write_bytes(file(**changed))
  tracemalloc.start()
  with pytest.raises(ValueError, match=message):
    rvq_file.from_bytes(file(**changed))
  with pytest.raises(ValueError, match='x.rvq'):
    rvq_file.read(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


def test_a_long_file_is_refused_unread(tmp_path):
  path = tmp_path / 'x.rvq'
  with open(path, 'wb') as stream:
    stream.write(file())
    stream.truncate(2**40)  # a terabyte of holes
  with pytest.raises(ValueError, match='its header allows 35 bytes'):
    rvq_file.read(path)


def test_an_id_of_k_is_refused():
  data = packing.pack(np.array([0, 1, 2, 9, 4, 5]), 16)
  with pytest.raises(ValueError, match='expected ids below 9, got 9'):
    rvq_file.from_bytes(file(data, codebook_size=9))


@pytest.mark.parametrize(
  'fields',
  [
    {},
    pytest.param({'quantizer': 'residual', 'depth': 1}, marks=pytest.mark.slow),
    {'quantizer': 'product', 'heads': 2, 'codebook_size': 300},
  ],
)
def test_decoding_a_file_is_reconstructing_the_image_to_the_byte(
  make_tokenizer, photograph, fields, tmp_path
):
  tokenizer, path = make_tokenizer(**fields), tmp_path / 'x.rvq'
  image = photograph(21, 30)
  files.encode_file(tokenizer, image, path)
  expected = reconstruct_images(tokenizer, image[None])[0]
  for name in ('x.png', 'x.webp'):
    files.write_image(tmp_path / name, files.decode_file(tokenizer, path))
    np.testing.assert_array_equal(files.read_image(tmp_path / name), expected)


def test_the_file_of_another_model_is_refused(
  make_tokenizer, photograph, tmp_path
):
  path = tmp_path / 'x.rvq'
  files.encode_file(make_tokenizer(seed=1), photograph(16, 16), path)
  with pytest.raises(ValueError, match='was written with the model'):
    files.decode_file(make_tokenizer(seed=2), path)


def test_an_image_is_not_written_with_loss(tmp_path):
  with pytest.raises(ValueError, match='expected .png or .webp.*got .*jpg'):
    files.write_image(tmp_path / 'x.jpg', np.zeros((4, 4, 3), np.uint8))


def test_the_report_stands_beside_codecs_of_no_more_bytes(
  make_tokenizer, photograph, tmp_path
):
  source = tmp_path / 'x.png'
  files.write_image(source, photograph(96, 128))
  text = files.encode_and_report(
    make_tokenizer(codebook_size=1024), source, tmp_path / 'x.rvq'
  )
  lines = text.splitlines()
  assert '128 x 96 pixels as 32 x 24 tokens of 10 bits' in lines[0]
  sizes = {x.split()[0]: int(x.split()[1].replace(',', '')) for x in lines[2:]}
  assert sizes.pop('.rvq') == (tmp_path / 'x.rvq').stat().st_size
  assert {'JPEG', 'WEBP'} <= set(sizes)
  for line in lines[3:]:
    codec = line.split()[0]
    fits = sizes[codec] <= (tmp_path / 'x.rvq').stat().st_size
    assert fits or 'its smallest file' in line


@pytest.fixture
def compared(photograph):
  """An image, what its tokens gave, and the rows of the table by name."""
  image, made = photograph(48, 64), photograph(48, 64, seed=1)
  text = codecs.format_comparison(image, made, 1500)
  head, *rows = text.splitlines()
  assert head.split() == ['bytes', 'bits/pixel', 'PSNR,', 'dB']
  return image, made, {row.split()[0]: row.split()[1:] for row in rows}


def psnr(image, other):
  error = sum(
    (int(a) - int(b)) ** 2
    for a, b in zip(image.ravel(), other.ravel(), strict=True)
  )
  return 10 * np.log10(255**2 / (error / image.size))


def test_the_table_has_the_bits_and_the_psnr_of_the_tokens(compared):
  image, made, rows = compared
  size, bits, quality = rows['.rvq']
  assert size == '1,500' and float(bits) == round(8 * 1500 / (48 * 64), 4)
  assert float(quality) == pytest.approx(psnr(image, made), abs=0.006)


def test_the_table_has_the_bits_and_the_psnr_of_a_jpeg_file(compared):
  image, _, rows = compared
  size, bits, quality, _, setting = rows['JPEG']
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'JPEG', quality=int(setting))
  length = len(buffer.getvalue())
  assert int(size.replace(',', '')) == length <= 1500
  assert float(bits) == pytest.approx(8 * length / (48 * 64), abs=6e-5)
  got = np.asarray(Image.open(buffer))
  assert float(quality) == pytest.approx(psnr(image, got), abs=0.006)
  # One quality more would not have fitted.
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'JPEG', quality=int(setting) + 1)
  assert len(buffer.getvalue()) > 1500


def test_the_table_names_the_codecs_that_pillow_has(compared):
  expected = {'.rvq', 'JPEG', 'WEBP'}
  expected |= {'AVIF'} if features.check('avif') else set()
  assert set(compared[2]) == expected
