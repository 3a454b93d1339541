"""Decoding a zoo of formats and damage; crops, the scale, flips and colours."""

import functools
import struct
import zlib
from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line
from PIL import Image, ImageCms
from tiny_data import encoded, noise

from rvq_jax.data import transforms
from rvq_jax.data.decoding import LoadImage
from rvq_jax.data.images import random_colors, random_flip
from rvq_jax.data.sources import Record
from rvq_jax.data.transforms import (
  CROPS,
  ImageError,
  decode_crop,
  decode_image,
  random_box,
  random_resized_crop,
  resample,
  resize_and_center_crop,
)
from rvq_jax.metrics import to_float, to_uint8


def _png(width, height, bits, kind, rows, **chunks):
  """A PNG written by hand, so that Pillow is not its own oracle."""

  def chunk(name, payload):
    crc = struct.pack('>I', zlib.crc32(name + payload))
    return struct.pack('>I', len(payload)) + name + payload + crc

  header = struct.pack('>IIBBBBB', width, height, bits, kind, 0, 0, 0)
  data = chunk(b'IHDR', header)
  data += b''.join(chunk(x.encode(), chunks[x]) for x in chunks)
  data += chunk(b'IDAT', zlib.compress(rows))
  return b'\x89PNG\r\n\x1a\n' + data + chunk(b'IEND', b'')


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


@pytest.mark.parametrize('crop', CROPS)
@pytest.mark.parametrize(
  'height, width, size, turned, scale',
  [
    (256, 308, 7, 1, 4),  # the width is no multiple of 8
    (256, 320, 7, 6, 8),  # as of a camera held upright
    (128, 160, 14, 8, 2),
    (128, 160, 20, 1, 1),  # 64 pixels would be under 4 x 20
    (151, 129, 8, 1, 1),  # odd
  ],
)
def test_a_large_jpeg_is_decoded_small_and_cut_as_if_at_full_size(
  monkeypatch, crop, height, width, size, turned, scale
):
  coarse = Image.fromarray(noise(height // 16, width // 16))
  image, exif = coarse.resize((width, height), Image.BICUBIC), Image.Exif()
  exif[0x0112] = turned
  data = encoded(image, 'JPEG', quality=98, exif=exif)
  load = LoadImage([Record(data, -1, 'x')], size, crop, (0.9, 1.0))
  read = mock.Mock(wraps=transforms.resample)
  monkeypatch.setattr(transforms, 'resample', read)
  small = load(0, np.random.default_rng(3))['image'].astype(float)
  assert read.call_args.args[3] == scale
  monkeypatch.setattr(transforms, 'DRAFT', 10**9)
  whole = load(0, np.random.default_rng(3))['image']
  assert read.call_args.args[3] == 1
  assert read.call_args_list[0].args[1] == read.call_args.args[1]
  error = np.mean((small - whole) ** 2)
  assert error <= (0 if scale == 1 else 255**2 * 10**-4.3)


@pytest.mark.parametrize('fmt', ['GIF', 'WEBP'])
def test_animation_gives_its_first_frame(fmt):
  red, blue = (Image.new('RGB', (8, 8), c) for c in ('#ff0000', '#0000ff'))
  options = {'save_all': True, 'append_images': [blue], 'lossless': True}
  data = encoded(red, fmt, **options)
  assert (decode_image(data) == [255, 0, 0]).all()


def _swapped_profile():
  """An sRGB profile with red and green exchanged, under another name."""
  data = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  for old, new in ((b'r', b'x'), (b'g', b'r'), (b'x', b'g')):
    data = data.replace(old + b'XYZ', new + b'XYZ', 1)
  return data.replace(b'\0s\0R\0G\0B', b'\0m\0i\0n\0e')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P'])
@pytest.mark.parametrize('length', [None, 200, 9])
def test_only_a_whole_colour_profile_is_converted_to_srgb(mode, length):
  image = Image.new('RGB', (2, 2), '#ff0000').convert(mode)
  data = encoded(image, icc_profile=_swapped_profile()[:length])
  expected = [255, 0, 0] if length else [0, 255, 0]
  assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


def _tiff(pixels, photometric, *, extra=None, bits=None, kind=1, profile=b''):
  """A TIFF written by hand, of pixels [h, w, c]; kind 2 is signed, 3 float."""
  height, width, channels = pixels.shape
  depth = bits or 8 * pixels.itemsize
  data = pixels.astype(pixels.dtype.newbyteorder('<')).tobytes()
  if depth == 12:
    (a, b), data = pixels.reshape(-1, 2).T.astype(int), b''
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
    data = packed.astype(np.uint8).tobytes()
  tags = {256: width, 257: height, 258: [depth] * channels, 259: 1}
  tags |= {262: photometric, 273: 1000, 277: channels, 278: height}
  tags |= {279: len(data)} | ({} if extra is None else {338: extra})
  tags |= {339: [kind] * channels} | ({34675: list(profile)} if profile else {})
  body, later = struct.pack('<H', len(tags)), b''
  for tag, value in sorted(tags.items()):
    value = value if isinstance(value, list) else [value]
    form, type_ = ('B', 7) if tag == 34675 else ('I', 4)
    packed = struct.pack(f'<{len(value)}{form}', *value)
    if len(packed) > 4:
      later += packed
      packed = struct.pack('<I', 1000 + len(data) + len(later) - len(packed))
    body += struct.pack('<HHI', tag, type_, len(value)) + packed.ljust(4, b'\0')
  head = b'II*\0' + struct.pack('<I', 8) + body + bytes(4)
  return head.ljust(1000, b'\0') + data + later


def _over_white(colour, alpha):
  return colour * alpha + 255 * (1 - alpha)


def _modes():
  """Mode -> (file, what a viewer shows, how far each pixel may be from it)."""
  rgb = noise(6, 8)
  grey, alpha = rgb[..., :1], rgb[..., 2:]
  share = alpha / 255
  wide = grey.astype(np.uint16) * 257 + np.uint16(100) * (grey < 255)
  shown, both = _over_white(grey, share), np.concatenate([grey, alpha], -1)
  low = np.round(grey * share).astype(np.uint8)
  pre = np.round(rgb * share).astype(np.uint8)
  palette = Image.fromarray(grey[..., 0] % 4, 'L').convert('P')
  palette.putpalette([9, 99, 199, 40, 50, 60, 0, 0, 255, 1, 2, 3])
  colours = np.reshape(palette.getpalette()[:12], (4, 3))[grey[..., 0] % 4]
  pa = palette.convert('PA')
  pa.putalpha(Image.fromarray(alpha[..., 0]))
  cmyk = np.concatenate([rgb, np.zeros_like(grey)], -1)
  lab = np.full((6, 8, 3), (138, 81, 70), np.uint8)  # red, of signed a and b
  black = Image.fromarray(grey[..., 0]).convert('1')
  bits = np.asarray(black)[..., None] * 255
  rows = b''.join(b'\0' + x.astype('>u2').tobytes() for x in wide)
  first = struct.pack('>H', wide[0, 0, 0])
  clear = np.where(wide == wide[0, 0, 0], 255, grey)
  deep = b''.join(b'\0' + x.tobytes() for x in (rgb.astype('>u2') * 257))
  third = (rgb[2, 2].astype('>u2') * 257).tobytes()
  third_clear = np.where((rgb == rgb[2, 2]).all(-1, keepdims=True), 255, rgb)
  save = {'fmt': 'TIFF'}
  big = Image.frombytes('I;16B', (8, 6), wide.astype('>u2').tobytes())
  return {
    '1': (encoded(black), bits, 0),
    '1, clear': (encoded(black, transparency=0), bits * 0 + 255, 0),
    'L': (_tiff(grey, 1), grey, 0),
    'L, white is 0': (_tiff(255 - grey, 0), grey, 0),
    'L, clear': (
      encoded(Image.fromarray(grey[..., 0]), transparency=int(grey[0, 0, 0])),
      np.where(grey == grey[0, 0, 0], 255, grey),
      0,
    ),
    'LA': (_tiff(both, 1, extra=2), shown, 1),
    'La': (_tiff(np.concatenate([low, alpha], -1), 1, extra=1), shown, 1.5),
    'P': (encoded(palette, **save), colours, 0),
    'PA': (encoded(pa, **save), _over_white(colours, share), 1),
    'RGB': (_tiff(rgb, 2), rgb, 0),
    'RGBA': (
      _tiff(np.concatenate([rgb, alpha], -1), 2, extra=2),
      _over_white(rgb, share),
      1,
    ),
    'RGBa': (
      _tiff(np.concatenate([pre, alpha], -1), 2, extra=1),
      _over_white(rgb, share),
      1.5,
    ),
    'RGBX': (_tiff(np.concatenate([rgb, alpha], -1), 2, extra=0), rgb, 0),
    'CMYK': (_tiff(cmyk, 5), 255 - rgb.astype(int), 0),
    'YCbCr': (encoded(Image.fromarray(rgb).convert('YCbCr'), **save), rgb, 3),
    'LAB': (_tiff(lab, 8), lab * 0 + (255, 0, 0), 5),
    'RGB 16': (_tiff(rgb.astype(np.uint16) * 257, 2), rgb, 0),
    'RGBA 16': (
      _tiff(
        np.concatenate([rgb, alpha], -1).astype(np.uint16) * 257, 2, extra=2
      ),
      _over_white(rgb, share),
      1,
    ),
    'I;16': (_tiff(wide, 1), wide / 257, 0.5),
    'I;16, white is 0': (_tiff(65535 - wide, 0), wide / 257, 0.5),
    'I;16, clear': (_png(8, 6, 16, 0, rows, tRNS=first), clear, 1),
    'I;16B': (encoded(big, **save), wide / 257, 0.5),
    'RGB 16, clear': (_png(8, 6, 16, 2, deep, tRNS=third), third_clear, 0),
    'I;12': (_tiff(wide >> 4, 1, bits=12), grey, 1),
    'I': (_tiff(wide.astype(np.int32), 1, kind=2), wide / 257, 0.5),
    'F': (_tiff(grey.astype(np.float32) / 255, 1, kind=3), grey, 0),
    'F, white is 0': (
      _tiff(1 - grey.astype(np.float32) / 255, 0, kind=3),
      grey,
      1,
    ),
  }


MODES = _modes()


@pytest.mark.parametrize('mode', MODES)
def test_each_mode_shows_its_pixels_over_white(mode):
  data, expected, error = MODES[mode]
  decoded = decode_image(data).astype(float)
  assert np.abs(decoded - expected).max() <= error


@pytest.mark.parametrize('channels', [1, 2])
def test_a_profile_of_grey_is_converted_with_and_without_alpha(channels):
  """A curve of gamma 1: 0.5 of the light is 188 of 255 in sRGB."""
  pixels = np.full((2, 2, channels), 128, np.uint8)
  extra = 2 if channels == 2 else None
  data = _tiff(pixels, 1, extra=extra, profile=_linear_grey())
  expected = 188 if channels == 1 else _over_white(188, 128 / 255)
  assert np.abs(decode_image(data).astype(float) - expected).max() <= 1


def _linear_grey():
  """An ICC profile of grey, written by hand, of which values are light."""
  white = b'XYZ \0\0\0\0' + struct.pack('>3i', 63190, 65536, 54061)
  curve = b'curv' + bytes(8)
  text = b'desc\0\0\0\0\0\0\0\5grey\0' + bytes(79)
  tags, body, start = [], b'', 128 + 4 + 3 * 12
  for name, data in ((b'wtpt', white), (b'kTRC', curve), (b'desc', text)):
    tags.append(name + struct.pack('>II', start + len(body), len(data)))
    body += data
  head = struct.pack('>I', start + len(body)) + bytes(4) + b'\2\x20\0\0'
  head += b'mntrGRAYXYZ ' + bytes(12) + b'acsp' + bytes(28)
  head += struct.pack('>3i', 63190, 65536, 54061)
  return head.ljust(128, b'\0') + struct.pack('>I', 3) + b''.join(tags) + body


FLOAT = encoded(np.full((4, 4), 200, np.float32), 'TIFF')
DEEP = encoded(np.full((4, 4), 2**20, np.int32), 'TIFF')
REFUSED_PNG = encoded(noise(96, 128))
REFUSED = {
  'empty': (b'', 'is empty'),
  'text': (b'this is not an image\n' * 10, 'no format that Pillow reads'),
  'jpeg magic only': (b'\xff\xd8\xff', 'cannot be decoded'),
  'postscript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no f'),
  'float': (FLOAT, r'pixels in \[0, 1\], got 200.0 to 200.0'),
  'deep': (DEEP, r'pixels in \[0, 65535\], got 1048576 to 1048576'),
  # Huge headers, before anything is decoded; the first limit is Pillow's own.
  'bomb': (_png(2**14, 2**13, 8, 2, b''), 'exceeds limit'),
  'large': (_png(2**13 + 1, 2**13, 8, 2, b''), 'expected at most 67108864'),
  'wide': (_png(2**12 + 1, 2**12, 16, 0, b''), 'expected at most 16777216'),
}
REFUSED['PNG of zeros'] = REFUSED_PNG[:-20] + bytes(20), 'cannot be decoded'
for fmt in ('JPEG', 'PNG', 'WEBP', 'GIF'):
  REFUSED[fmt] = encoded(noise(64, 64), fmt)[:-400], 'cannot be decoded'


@pytest.mark.parametrize('kind', REFUSED)
def test_damage_is_an_image_error_that_names_the_image(kind):
  data, message = REFUSED[kind]
  for decode in (decode_image, functools.partial(decode_crop, size=8)):
    with one_line(f"'train/7' .*{message}", ImageError):
      decode(data, name='train/7')


# Pillow warns about the block; here that is the expected outcome.
@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_does_not_cost_the_image():
  data = bytearray(encoded(noise(16, 16), 'JPEG'))
  block = b'Exif\x00\x00II*\x00\xff\xff\xff\x7f'
  app1 = b'\xff\xe1' + struct.pack('>H', len(block) + 2) + block
  assert decode_image(bytes(data[:2] + app1 + data[2:])).shape == (16, 16, 3)


def _ramp(height, width):
  """Red is the column, green the row."""
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
  box = random_box(32, 32, rng)
  np.testing.assert_array_equal(resample(image, box, 32), image)
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
  assert resample(image, random_box(*shape, rng), 8).shape == (8, 8, 3)
  assert random_resized_crop(image, 8, rng).shape == (8, 8, 3)


def test_random_crop_reaches_both_ends_of_the_longer_side():
  rng = np.random.default_rng(0)
  assert {random_box(10, 14, rng) for _ in range(200)} == {
    (left, 0, 10, 10) for left in range(5)
  }


def test_random_resized_crop_takes_the_share_of_area_asked_for():
  image, rng = _ramp(200, 200), np.random.default_rng(0)
  for _ in range(50):
    crop = random_resized_crop(image, 64, rng, scale=(0.2, 0.3)).astype(int)
    width = np.ptp(crop[..., 0]) + 1
    height = np.ptp(crop[..., 1]) + 1
    assert 0.17 < width * height / 200**2 < 0.33
    assert 0.7 < width / height < 1.42
