"""Images of any size to ids and back, in bounded memory.

Attention costs the square of the number of positions. A grid of at most
WINDOW x WINDOW is coded in one piece and equals `Tokenizer.reconstruct`
bit-exactly. A larger grid is coded in windows that overlap: each keeps only
positions at least HALO from its inner borders: no seams show. Encoder and
decoder use the same windows. Multi-scale tokens have none.
"""

import io
import itertools

import jax
import numpy as np

from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.io import write_atomic
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer.tokenizer import Tokenizer

WINDOW, HALO = 64, 8
_MAX_BYTES = 2**28


def spans(size: int) -> list[tuple[int, int, int]]:
  """The windows (start, first, last) along a side of `size` positions.

  One is min(size, WINDOW) long and keeps the positions first ... last - 1.
  """
  if size <= WINDOW:
    return [(0, 0, size)]
  windows, first = [], 0
  while first < size:
    start = min(max(first - HALO, 0), size - WINDOW)
    last = size if start + WINDOW == size else start + WINDOW - HALO
    windows.append((start, first, last))
    first = last
  return windows


def _by_windows(function, x, f, result, g):
  """Fills `result`, g pixels per position, by windows of x, f per position."""
  windows = itertools.product(*(spans(side // f) for side in x.shape[1:3]))
  for (y, top, bottom), (z, left, right) in windows:
    part = function(x[:, y * f : (y + WINDOW) * f, z * f : (z + WINDOW) * f])
    rows = slice((top - y) * g, (bottom - y) * g)
    columns = slice((left - z) * g, (right - z) * g)
    kept = result[:, top * g : bottom * g, left * g : right * g]
    kept[:] = np.asarray(part)[:, rows, columns]
  return result


def encode_images(
  tokenizer: Tokenizer, images: np.ndarray, *, placement=None
) -> np.ndarray:
  """Ids of images of any size: `axes`, `ids_dtype`, H = ceil(h / factor).

  Args:
    images: uint8 [B, h, w, 3]; their last row and column are repeated until
      the factor divides both sides.
    placement: sharding of the images; None: one device.
  """
  f, (height, width) = tokenizer.factor, images.shape[1:3]
  padding = (0, 0), (0, -height % f), (0, -width % f), (0, 0)
  images = np.pad(images, padding, 'edge')

  def encode(x):
    return tokenizer.encode(jax.device_put(x, placement))

  if not tokenizer.any_size:
    return np.asarray(encode(images), tokenizer.ids_dtype)
  shape = len(images), *tokenizer.ids_shape(height, width)
  ids = np.empty(shape, tokenizer.ids_dtype)
  return _by_windows(encode, images, f, ids, 1)


def decode_ids(
  tokenizer: Tokenizer, ids: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Images uint8 [B, height, width, 3] of ids, as of `encode_images`.

  height is at most H factor, width at most W factor: more pixels are cropped.
  """

  def decode(x):
    return np.asarray(to_uint8(tokenizer.decode(x)))

  if not tokenizer.any_size:
    return decode(ids)[:, :height, :width]
  f, (rows, columns) = tokenizer.factor, ids.shape[1:3]
  images = np.empty((len(ids), rows * f, columns * f, 3), np.uint8)
  return _by_windows(decode, ids, 1, images, f)[:, :height, :width]


def save_image(tokenizer: Tokenizer, image: np.ndarray, path) -> np.ndarray:
  """Writes the ids of an image, uint8 [h, w, 3], as .npz; returns them."""
  ids = encode_images(tokenizer, image[None])[0]
  content = io.BytesIO()
  np.savez(content, ids=ids, size=image.shape[:2], **tokenizer.about_ids())
  write_atomic(path, content.getvalue())
  return ids


def load_image(tokenizer: Tokenizer, path) -> np.ndarray:
  """Decodes the .npz file of an image: uint8 [h, w, 3]; refuses others."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      if sum(entry.file_size for entry in arrays.zip.infolist()) > _MAX_BYTES:
        raise ValueError(f'it holds more than {_MAX_BYTES} bytes')
      ids, encoder_hash = arrays['ids'], str(arrays['encoder_hash'])
      height, width = map(int, arrays['size'])
    if not (height > 0 < width and height * width <= MAX_PIXELS):
      raise ValueError(f'it says {width} x {height} pixels')
  # Damage raises a dozen types, from KeyError to zlib.error.
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(
      f'{path}: expected an .npz file of rvq encode: {reason}'
    ) from error
  tokenizer.check_encoder(encoder_hash, path)
  shape, dtype = tokenizer.ids_shape(height, width), tokenizer.ids_dtype
  if (ids.shape, ids.dtype) != (shape, dtype):
    raise ValueError(
      f'{path} is damaged: expected ids {dtype} {list(shape)}, got {ids.dtype} '
      f'{list(ids.shape)}'
    )
  return decode_ids(tokenizer, ids[None], height, width)[0]
