"""Image transforms on the host: decoding, cropping, resampling.

An image is uint8 [h, w, 3], RGB; a crop uint8 [size, size, 3]: a box of the
image, resampled once, bicubic with antialiasing, or copied if it has the size.
"""

import functools
import io
import math

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Larger images are refused: they are decompression bombs or mistakes."""
_COMMON = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')  # tried first
# Formats that need a program or plugin beside Pillow, or hold no pictures.
_UNREADABLE = {'BUFR', 'EPS', 'FITS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'}
_SRGB = ('sRGB', 'sRGB built-in', 'sRGB IEC61966-2.1')


class ImageError(ValueError):
  """The bytes are not an image that can be decoded."""


@functools.cache
def formats() -> tuple[str, ...]:
  """Pillow's names of the formats that are read."""
  Image.init()
  return tuple(dict.fromkeys([*_COMMON, *sorted({*Image.OPEN} - _UNREADABLE)]))


@functools.cache
def extensions() -> tuple[str, ...]:
  """Returns the file name extensions of `formats()`, in lower case."""
  known, read = Image.registered_extensions(), formats()
  return tuple(end for end in known if known[end] in read)


def decode_image(
  data: bytes, *, name: str = '', shorter_side: int | None = None
) -> np.ndarray:
  """Decodes an encoded image to RGB as a viewer would show it.

  EXIF orientation is applied, a colour profile is converted to sRGB,
  transparency is composited over white, CMYK is converted, 16 bits are scaled
  to 8, and an animation gives its first frame. A JPEG more than twice as large
  as the `shorter_side` that the caller wants is decoded at 1/2, 1/4 or 1/8.

  Raises:
    ImageError: it is corrupt, in none of `formats()`, has float pixels, or more
      than `MAX_PIXELS` pixels, a quarter of that with 16 bits; names `name`.
  """
  label = f'image {name!r}' if name else 'image'
  if not data:
    raise ImageError(f'{label} is empty (0 bytes)')
  try:
    with Image.open(io.BytesIO(data), formats=formats()) as image:
      if image.mode == 'F':
        raise ImageError(f'{label} has float pixels: expected integers')
      limit = MAX_PIXELS // (4 if image.mode.startswith('I') else 1)
      if image.width * image.height > limit:
        raise ImageError(
          f'{label} has {image.width} x {image.height} pixels: expected at '
          f'most {limit}'
        )
      if shorter_side:
        image.draft(None, (2 * shorter_side, 2 * shorter_side))
      image.load()
      return np.asarray(_to_rgb(_upright(image)))
  except (ImageError, MemoryError):
    raise
  except Exception as error:  # Pillow reports damage through a dozen types
    reason = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is a Python object
      reason = 'it is in no format that Pillow reads'
    raise ImageError(f'{label} cannot be decoded: {reason}') from error


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; a damaged EXIF block is ignored."""
  try:
    turned = image.getexif().get(0x0112, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image
  except MemoryError:
    raise
  except Exception:  # the pixels are intact even if the metadata is not
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any Pillow mode to RGB over a white background."""
  if image.mode.startswith('I'):  # 16-bit grey: convert('L') would clip at 255
    wide = np.clip(np.asarray(image), 0, 65535).astype(np.int32)
    grey = ((wide + 128) // 257).astype(np.uint8)
    return Image.fromarray(grey).convert('RGB')
  if image.has_transparency_data:
    rgba = _to_srgb(image.convert('RGBA'))
    white = Image.new('RGBA', rgba.size, 'white')
    return Image.alpha_composite(white, rgba).convert('RGB')
  image = _to_srgb(image.convert('RGB') if image.mode == 'P' else image)
  return image if image.mode == 'RGB' else image.convert('RGB')


def _to_srgb(image: Image.Image) -> Image.Image:
  """Applies an ICC profile; a damaged one is ignored."""
  data = image.info.get('icc_profile')
  if not data or image.mode not in ('RGB', 'RGBA', 'L', 'CMYK'):
    return image
  mode = 'RGBA' if image.mode == 'RGBA' else 'RGB'
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    if ImageCms.getProfileDescription(profile).strip() in _SRGB:
      return image
    srgb = ImageCms.createProfile('sRGB')
    return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
  except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
    return image


def resize_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the shorter side to `size` and takes the central square."""
  height, width = image.shape[:2]
  side = min(height, width)
  left, top = (width - side) // 2, (height - side) // 2
  return _resample(image, left, top, side, side, size)


def random_crop(image: np.ndarray, size: int, rng) -> np.ndarray:
  """Scales the shorter side to `size` and takes a random square."""
  height, width = image.shape[:2]
  side = min(height, width)
  left = int(rng.integers(width - side + 1))
  top = int(rng.integers(height - side + 1))
  return _resample(image, left, top, side, side, size)


def random_resized_crop(image, size: int, rng, scale=(0.08, 1.0)) -> np.ndarray:
  """Cuts out a box of random area and shape and resizes it (Inception crop).

  Its share of the area is drawn from `scale`, its width / height log-uniformly
  from 3 / 4 to 4 / 3. After ten draws that do not fit: the central square.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    box_w = round(math.sqrt(area * shape))
    box_h = round(math.sqrt(area / shape))
    if 0 < box_w <= width and 0 < box_h <= height:
      left = int(rng.integers(width - box_w + 1))
      top = int(rng.integers(height - box_h + 1))
      return _resample(image, left, top, box_w, box_h, size)
  return resize_and_center_crop(image, size)


CROPS = {
  'none': lambda image, size, *_: resize_and_center_crop(image, size),
  'random': lambda image, size, rng, _: random_crop(image, size, rng),
  'random_resized': random_resized_crop,
}
"""Name of a crop -> function (image, size, rng, scale) -> image."""


def _resample(image, left, top, width, height, size: int) -> np.ndarray:
  """Resizes the box of `image` to a square of `size` pixels."""
  if width == height == size:
    return np.ascontiguousarray(image[top : top + size, left : left + size])
  # A reducing gap of 3 looks like the exact filter, by eye and by PSNR.
  resized = Image.fromarray(image).resize(
    (size, size),
    Image.Resampling.BICUBIC,
    box=(left, top, left + width, top + height),
    reducing_gap=3.0,
  )
  return np.asarray(resized)
