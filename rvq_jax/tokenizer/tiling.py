"""Images of any size to ids and back, in bounded memory.

The decoder attends to all positions at once, which costs the square of their
number. A grid of at most WINDOW x WINDOW positions is coded in one piece and
equals `Tokenizer.reconstruct` bit-exactly. A larger grid is coded in windows
that overlap: each keeps only positions at least HALO from its inner borders,
so every position has one id and no seams show. The windows depend only on the
grid, so encoder and decoder agree on them. Multi-scale tokens have no windows:
their images are of one size.
"""

import functools
import io
import itertools

import jax
import numpy as np

from rvq_jax import sharding
from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.io import write_atomic
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer.tokenizer import Tokenizer

WINDOW, HALO = 64, 8
_MAX_BYTES = 2**28


def spans(size: int) -> list[tuple[int, int, int]]:
  """The windows along a side of `size` positions.

  Returns:
    (start, first, last) per window: it begins at `start`, is
    min(size, WINDOW) long, and keeps the positions first ... last - 1.
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


def over_devices(tokenizer: Tokenizer, batch: int):
  """The tokenizer on all devices of this host, and the sharding of batches.

  It uses the largest number of devices that divides `batch`.
  """
  devices = jax.local_devices()
  count = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
  mesh = sharding.data_mesh(devices[:count])
  variables = jax.device_put(tokenizer.variables, sharding.replicated(mesh))
  spread = Tokenizer(
    tokenizer.model, variables, config=tokenizer.config, step=tokenizer.step
  )
  return spread, sharding.by_rows(mesh)


def encode_images(
  tokenizer: Tokenizer, images: np.ndarray, *, placement=None
) -> np.ndarray:
  """Ids of images of any size.

  Args:
    tokenizer: the model.
    images: uint8 [B, h, w, 3]; their last row and column are repeated until
      the factor divides both sides.
    placement: sharding of the images; None: one device.

  Returns:
    ids of the axes of `encode`, H = ceil(h / factor), of `ids_dtype`.
  """
  f = tokenizer.factor
  height, width = images.shape[1:3]
  padding = (0, -height % f), (0, -width % f)
  images = np.pad(images, ((0, 0), *padding, (0, 0)), 'edge')
  place = functools.partial(jax.device_put, device=placement)
  if not tokenizer.any_size:
    return np.asarray(tokenizer.encode(place(images)), tokenizer.ids_dtype)
  shape = tokenizer.ids_shape(height, width)
  ids = np.empty((len(images), *shape), tokenizer.ids_dtype)
  windows = itertools.product(spans(shape[0]), spans(shape[1]))
  for (y, top, bottom), (x, left, right) in windows:
    window = images[:, y * f : (y + WINDOW) * f, x * f : (x + WINDOW) * f]
    result = np.asarray(tokenizer.encode(place(window)))
    ids[:, top:bottom, left:right] = result[
      :, top - y : bottom - y, left - x : right - x
    ]
  return ids


def decode_ids(
  tokenizer: Tokenizer, ids: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Images of ids, cropped to their size.

  Args:
    tokenizer: the model.
    ids: as of `encode_images`.
    height: of the images in pixels, at most H factor.
    width: at most W factor.

  Returns:
    uint8 [B, height, width, 3].
  """
  if not tokenizer.any_size:
    return np.asarray(to_uint8(tokenizer.decode(ids)))[:, :height, :width]
  f = tokenizer.factor
  rows, columns = ids.shape[1:3]
  images = np.empty((len(ids), rows * f, columns * f, 3), np.uint8)
  windows = itertools.product(spans(rows), spans(columns))
  for (y, top, bottom), (x, left, right) in windows:
    window = ids[:, y : y + WINDOW, x : x + WINDOW]
    result = np.asarray(to_uint8(tokenizer.decode(window)))
    images[:, top * f : bottom * f, left * f : right * f] = result[
      :, (top - y) * f : (bottom - y) * f, (left - x) * f : (right - x) * f
    ]
  return images[:, :height, :width]


def save_image(tokenizer: Tokenizer, image: np.ndarray, path) -> np.ndarray:
  """Writes the ids of an image, uint8 [h, w, 3], as .npz; returns them."""
  ids = encode_images(tokenizer, image[None])[0]
  content = io.BytesIO()
  np.savez(content, ids=ids, size=image.shape[:2], **tokenizer.about_ids())
  write_atomic(path, content.getvalue())
  return ids


def load_image(tokenizer: Tokenizer, path) -> np.ndarray:
  """Decodes the .npz file of an image: uint8 [h, w, 3].

  Raises:
    ValueError: the file is missing, damaged, foreign, or of another model.
  """
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
      f'{path}: expected an .npz file of launch/encode.py: {reason}'
    ) from error
  tokenizer.check_encoder(encoder_hash, path)
  shape, dtype = tokenizer.ids_shape(height, width), tokenizer.ids_dtype
  if (ids.shape, ids.dtype) != (shape, dtype):
    raise ValueError(
      f'{path} is damaged: expected ids {dtype} {list(shape)}, got {ids.dtype} '
      f'{list(ids.shape)}'
    )
  return decode_ids(tokenizer, ids[None], height, width)[0]
