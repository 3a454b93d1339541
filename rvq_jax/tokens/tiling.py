"""Images of any size to grids of ids and back, in bounded memory.

The decoder attends to all positions at once, which costs the square of their
number. A grid of up to WINDOW x WINDOW positions is coded in one piece, and the
result is that of `Tokenizer.reconstruct` to the bit. A larger one is coded in
windows that overlap: each gives what lies HALO positions or more inside it, so
that there is one id a position, and seams are not seen. The windows depend on
the grid alone, so encoder and decoder agree on them.
"""

import itertools
import logging
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.metrics import to_uint8

WINDOW, HALO = 64, 8


def grid_shape(height: int, width: int, factor: int) -> tuple[int, int]:
  """Positions (H, W) of an image, its sides rounded up to the factor."""
  return -(-height // factor), -(-width // factor)


def pad_to_factor(images: np.ndarray, factor: int) -> np.ndarray:
  """Repeats the last row and column of images until `factor` divides them.

  Args:
    images: [B, h, w, 3].
    factor: pixels along the side of a token.

  Returns:
    [B, H factor, W factor, 3].
  """
  height, width = images.shape[1:3]
  rows, columns = grid_shape(height, width, factor)
  below, right = rows * factor - height, columns * factor - width
  if not (below or right):
    return images
  return np.pad(images, ((0, 0), (0, below), (0, right), (0, 0)), 'edge')


def spans(size: int) -> list[tuple[int, int, int]]:
  """The windows along one side of a grid.

  Args:
    size: positions along the side.

  Returns:
    (start, first, last) of each: it begins at `start`, is min(size, WINDOW)
    long, and gives the positions first ... last - 1.
  """
  if size <= WINDOW:
    return [(0, 0, size)]
  found, first = [], 0
  while first < size:
    start = min(max(first - HALO, 0), size - WINDOW)
    last = size if start + WINDOW == size else start + WINDOW - HALO
    found.append((start, first, last))
    first = last
  return found


def _windows(rows: int, columns: int, desc: str | None) -> Iterable[tuple]:
  """The windows of a grid, with a progress bar where it has a name.

  Where there is no terminal, a line in the log says how many there are.
  """
  windows = list(itertools.product(spans(rows), spans(columns)))
  if desc is None or len(windows) == 1:
    return windows
  bar = tqdm(windows, unit='window', desc=desc, disable=None)
  if bar.disable:
    logging.info(
      '%s: %d windows of %d x %d tokens',
      *(desc, len(windows), min(columns, WINDOW), min(rows, WINDOW)),
    )
  return bar


def encode_images(
  tokenizer: Tokenizer, images: np.ndarray, *, desc: str | None = None
) -> np.ndarray:
  """Ids of images of any size.

  Args:
    tokenizer: the model.
    images: uint8 [B, h, w, 3]; padded to the factor by their last pixels.
    desc: what to call it on a progress bar over the windows; None for none.

  Returns:
    ids int32 [B, ceil(h / factor), ceil(w / factor)]; [..., L] with several
    codes a position.
  """
  f = tokenizer.factor
  images = pad_to_factor(images, f)
  rows, columns = grid_shape(*images.shape[1:3], f)
  codes = (
    (tokenizer.codes_per_position,) if tokenizer.codes_per_position else ()
  )
  ids = np.empty((len(images), rows, columns, *codes), np.int32)
  for (y, top, bottom), (x, left, right) in _windows(rows, columns, desc):
    window = images[:, y * f : (y + WINDOW) * f, x * f : (x + WINDOW) * f]
    made = np.asarray(tokenizer.encode(window))
    ids[:, top:bottom, left:right] = made[
      :, top - y : bottom - y, left - x : right - x
    ]
  return ids


def decode_ids(
  tokenizer: Tokenizer,
  ids: np.ndarray,
  height: int,
  width: int,
  *,
  desc: str | None = None,
) -> np.ndarray:
  """Images of ids, cropped to their size.

  Args:
    tokenizer: the model.
    ids: [B, H, W] or [B, H, W, L], integers in [0, K).
    height: of the images in pixels, at most H factor.
    width: of the images in pixels, at most W factor.
    desc: what to call it on a progress bar over the windows; None for none.

  Returns:
    uint8 [B, height, width, 3].

  Raises:
    ValueError: an id is out of range.
  """
  f = tokenizer.factor
  rows, columns = ids.shape[1:3]
  images = np.empty((len(ids), rows * f, columns * f, 3), np.uint8)
  for (y, top, bottom), (x, left, right) in _windows(rows, columns, desc):
    window = ids[:, y : y + WINDOW, x : x + WINDOW]
    made = np.asarray(to_uint8(tokenizer.decode(jnp.asarray(window))))
    images[:, top * f : bottom * f, left * f : right * f] = made[
      :, (top - y) * f : (bottom - y) * f, (left - x) * f : (right - x) * f
    ]
  return images[:, :height, :width]


def reconstruct_images(tokenizer: Tokenizer, images: np.ndarray) -> np.ndarray:
  """What decoding the ids of images gives: uint8 [B, h, w, 3] of the same."""
  ids = encode_images(tokenizer, images)
  return decode_ids(tokenizer, ids, *images.shape[1:3])
