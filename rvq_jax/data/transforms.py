"""Image transforms on the host: decoding, cropping, resampling.

An image is uint8 [h, w, 3], RGB; a crop of it is uint8 [size, size, 3]. Every
crop is taken in the coordinates of the source image and resampled once, bicubic
with antialiasing; an image of the right size is returned as it is.
"""

import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Larger images are refused: they are decompression bombs or mistakes."""
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')


class ImageError(ValueError):
  """The bytes are not an image that can be decoded."""


def decode_image(
  data: bytes, *, name: str = '', shorter_side: int | None = None
) -> np.ndarray:
  """Decodes an encoded image to RGB as a viewer would show it.

  EXIF orientation is applied, transparency is composited over white, CMYK is
  converted, 16 bits are scaled to 8, and an animation gives its first frame.

  Args:
    data: JPEG, PNG, WebP, GIF or BMP.
    name: what to call the image in an error.
    shorter_side: to which the caller will shrink it, in pixels. A JPEG more
      than twice as large is decoded several times faster at 1/2, 1/4 or 1/8.

  Raises:
    ImageError: it is corrupt, of another format or over `MAX_PIXELS` pixels.
  """
  label = f'image {name!r}' if name else 'image'
  if not data:
    raise ImageError(f'{label} is empty (0 bytes)')
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise ImageError(
          f'{label} has {image.width} x {image.height} pixels: expected at '
          f'most {MAX_PIXELS}'
        )
      if shorter_side:
        image.draft(None, (2 * shorter_side, 2 * shorter_side))
      image.load()
      return np.asarray(_to_rgb(_upright(image)))
  except (ImageError, MemoryError):
    raise
  except Exception as error:  # Pillow reports damage through a dozen types
    reason = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # which names an object
      reason = f'expected one of {", ".join(_FORMATS)}'
    raise ImageError(f'{label} cannot be decoded: {reason}') from error


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; a damaged EXIF block is ignored."""
  try:
    turned = image.getexif().get(0x0112, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image
  except MemoryError:
    raise
  except Exception:  # the pixels are intact even where the metadata is not
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any Pillow mode to RGB over a white background."""
  if image.mode.startswith('I'):  # 16-bit grey: convert('L') would clip at 255
    wide = np.asarray(image).astype(np.int64)
    grey = np.clip((wide + 128) // 257, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert('RGB')
  if image.has_transparency_data:
    rgba = image.convert('RGBA')
    white = Image.new('RGBA', rgba.size, 'white')
    return Image.alpha_composite(white, rgba).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')


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


def random_resized_crop(
  image: np.ndarray, size: int, rng: np.random.Generator, *, scale=(0.08, 1.0)
) -> np.ndarray:
  """Cuts out a box of random area and shape and resizes it (Inception crop).

  Its share of the image's area is drawn from `scale`, its width / height
  log-uniformly from 3 / 4 to 4 / 3. After ten draws that do not fit into the
  image it is the central square.
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


def _resample(image, left, top, width, height, size: int) -> np.ndarray:
  """Resizes the box of `image` to a square of `size` pixels."""
  if width == height == size:
    return np.ascontiguousarray(image[top : top + size, left : left + size])
  # A reducing gap of 3 is not told from the exact filter by eye or by PSNR.
  resized = Image.fromarray(image).resize(
    (size, size),
    Image.Resampling.BICUBIC,
    box=(left, top, left + width, top + height),
    reducing_gap=3.0,
  )
  return np.asarray(resized)
