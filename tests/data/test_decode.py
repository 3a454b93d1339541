"""decode_image against a zoo of formats and of damage."""

import struct
import zlib

import numpy as np
import pytest
from errors import one_line
from PIL import Image, ImageCms
from tiny_data import encoded, noise

from rvq_jax.data.transforms import ImageError, decode_image


def _png(width, height, bits, kind, rows):
  """A PNG written by hand, so that Pillow is not its own oracle."""

  def chunk(name, payload):
    crc = struct.pack('>I', zlib.crc32(name + payload))
    return struct.pack('>I', len(payload)) + name + payload + crc

  header = struct.pack('>IIBBBBB', width, height, bits, kind, 0, 0, 0)
  data = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows))
  return b'\x89PNG\r\n\x1a\n' + data + chunk(b'IEND', b'')


@pytest.mark.parametrize('mode', ['L', '1'])
def test_grey_is_repeated_in_three_channels(mode):
  image = Image.fromarray(noise()[..., 0]).convert(mode)
  decoded = decode_image(encoded(image))
  expected = np.asarray(image.convert('L'))
  for channel in range(3):
    np.testing.assert_array_equal(decoded[..., channel], expected)


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_is_composited_over_white(mode):
  alpha = np.arange(54, dtype=np.uint8).reshape(6, 9, 1) * 4
  colour = noise() if mode == 'RGBA' else noise()[..., :1]
  image = Image.fromarray(np.concatenate([colour, alpha], -1))
  assert image.mode == mode
  expected = colour * (alpha / 255) + 255 * (1 - alpha / 255)
  assert np.abs(decode_image(encoded(image)) - expected).max() <= 1


@pytest.mark.parametrize(
  'mode, transparent, first',
  [('P', b'\0\xff', 255), ('P', None, 9), ('RGB', (9, 9, 9), 255)],
)
def test_a_transparent_palette_entry_or_colour_is_white(
  mode, transparent, first
):
  image = Image.new('P', (2, 1))
  image.putpalette([9, 9, 9, 40, 50, 60])
  image.putpixel((1, 0), 1)
  data = encoded(image.convert(mode), transparency=transparent)
  assert decode_image(data).tolist() == [[[first] * 3, [40, 50, 60]]]


@pytest.mark.parametrize('kind, channels', [(0, 1), (2, 3), (4, 2)])
def test_16_bits_are_scaled_and_not_clipped(kind, channels):
  """Grey, colour and grey with alpha, which is composited over white."""
  values = np.array([0, 128, 257, 32768, 65407, 65535, 300, 1000, 60000] * 2)
  pixels = values[: 18 // channels * channels].reshape(-1, channels)
  rows = b'\0' + pixels.astype('>u2').tobytes()
  decoded = decode_image(_png(len(pixels), 1, 16, kind, rows))[0]
  share = pixels[:, 1:] / 65535 if kind == 4 else 1
  colour = pixels[:, :1] if kind == 4 else pixels
  expected = colour / 257 * share + 255 * (1 - share)
  assert np.abs(decoded - expected).max() <= (2 if kind == 4 else 1)
  if kind == 0:
    np.testing.assert_array_equal(decoded[:, :1], np.round(expected))


def test_cmyk_jpeg_shows_its_colours():
  """Pillow writes CMYK the way Adobe does, inverted and marked."""
  image = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
  data = encoded(image, 'JPEG', quality=95)
  assert b'Adobe' in data
  decoded = decode_image(data).astype(int)
  assert decoded.shape == (16, 16, 3)
  assert np.abs(decoded - [255, 0, 0]).max() < 8


# By orientation: transposed, then turned upside down, then mirrored.
VIEWS = ['', 'm', 'um', 'u', 't', 'tm', 'tum', 'tu']


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(orientation):
  exif, view = Image.Exif(), VIEWS[orientation - 1]
  exif[0x0112] = orientation
  up, left = (-1 if x in view else 1 for x in 'um')
  expected = noise().transpose((1, 0, 2) if 't' in view else (0, 1, 2))
  decoded = decode_image(encoded(noise(), exif=exif))
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, expected[::up, ::left])


@pytest.mark.parametrize('shorter_side, step', [(None, 1), (30, 1), (16, 2)])
def test_a_turned_jpeg_keeps_twice_the_pixels_asked_for(shorter_side, step):
  rows, columns = np.mgrid[0:64, 0:96]
  image = np.stack([4 * rows, 2 * columns, rows + columns], -1).astype(np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6  # as of a camera held upright
  data = encoded(image, 'JPEG', quality=98, exif=exif)
  decoded = decode_image(data, shorter_side=shorter_side)
  shrunk = image.reshape(64 // step, step, 96 // step, step, 3).mean((1, 3))
  assert decoded.shape == (96 // step, 64 // step, 3)
  assert np.abs(decoded - np.rot90(shrunk, -1)).max() <= 6


@pytest.mark.parametrize('fmt', ['GIF', 'WEBP'])
def test_animation_gives_its_first_frame(fmt):
  red, blue = (Image.new('RGB', (8, 8), c) for c in ('#ff0000', '#0000ff'))
  options = {'lossless': True} if fmt == 'WEBP' else {}
  data = encoded(red, fmt, save_all=True, append_images=[blue], **options)
  assert (decode_image(data) == [255, 0, 0]).all()


def _swapped_profile():
  """An sRGB profile with red and green exchanged, under another name."""
  data = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  for old, new in ((b'r', b'x'), (b'g', b'r'), (b'x', b'g')):
    data = data.replace(old + b'XYZ', new + b'XYZ', 1)
  return data.replace(b'\0s\0R\0G\0B', b'\0m\0i\0n\0e')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P'])
@pytest.mark.parametrize(
  'profile, expected',
  [
    (_swapped_profile(), [0, 255, 0]),
    (_swapped_profile()[:200], [255, 0, 0]),
    (b'damaged', [255, 0, 0]),
  ],
  ids=['whole', 'cut', 'damaged'],
)
def test_a_colour_profile_is_converted_to_srgb(mode, profile, expected):
  image = Image.new('RGB', (2, 2), '#ff0000').convert(mode)
  decoded = decode_image(encoded(image, icc_profile=profile))
  assert np.abs(decoded.astype(int) - expected).max() <= 1


FLOAT = encoded(np.ones((4, 4), np.float32), 'TIFF')
REFUSED = {
  'empty': (b'', 'is empty'),
  'text': (b'this is not an image\n' * 10, 'no format that Pillow reads'),
  'jpeg magic only': (b'\xff\xd8\xff', 'cannot be decoded'),
  'postscript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no f'),
  'float': (FLOAT, 'float pixels'),
  # Huge headers, before anything is decoded; the first limit is Pillow's own.
  'bomb': (_png(2**14, 2**13, 8, 2, b''), 'exceeds limit'),
  'large': (_png(2**13 + 1, 2**13, 8, 2, b''), 'expected at most 67108864'),
  'wide': (_png(2**12 + 1, 2**12, 16, 0, b''), 'expected at most 16777216'),
}
for fmt in ('JPEG', 'PNG', 'WEBP', 'GIF'):
  REFUSED[fmt] = encoded(noise(64, 64), fmt)[:-400], 'cannot be decoded'


@pytest.mark.parametrize('kind', REFUSED)
def test_damage_is_an_image_error_that_names_the_image(kind):
  data, message = REFUSED[kind]
  with one_line(f"'train/7' .*{message}", ImageError):
    decode_image(data, name='train/7')


# Pillow warns about the block; here that is the expected outcome.
@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_does_not_cost_the_image():
  data = bytearray(encoded(noise(16, 16), 'JPEG'))
  block = b'Exif\x00\x00II*\x00\xff\xff\xff\x7f'
  app1 = b'\xff\xe1' + struct.pack('>H', len(block) + 2) + block
  assert decode_image(bytes(data[:2] + app1 + data[2:])).shape == (16, 16, 3)
