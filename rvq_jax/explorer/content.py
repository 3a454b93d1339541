"""What the page shows, as JSON values and pictures in data URLs."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer.tiling import decode_ids, encode_images
from rvq_jax.tokenizer.tokenizer import Tokenizer

MAX_SIDE = 512
"""Images are shrunk to this many pixels per side: the page holds them all."""

_NEIGHBORS = 8
_SWATCH, _SHEET_COLUMNS = 16, 32  # pixels per side, swatches per row
_GRID = 3  # positions per side of the grid that shows a single code


def data_url(image: np.ndarray) -> str:
  """A PNG data URL of an image, uint8 [h, w, 3]."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG', optimize=True)
  return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def shrink(image: np.ndarray) -> np.ndarray:
  """The image with its longer side at most MAX_SIDE, uint8 [h, w, 3]."""
  picture = Image.fromarray(image)
  picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
  return np.asarray(picture)


def _levels(tokenizer: Tokenizer) -> int:
  """Scales, or codes per position."""
  return len(tokenizer.sides or '') or tokenizer.codes_per_position or 1


def model_content(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
  """What the page says of the model."""
  quantizer = tokenizer.config['model.quantizer']
  return {
    'name': name,
    'step': tokenizer.step,
    'codebookSize': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'levels': _levels(tokenizer),
    'nested': bool(tokenizer.prefixes),
    'sides': tokenizer.sides,
    'quantizer': quantizer,
    'hash': tokenizer.model_hash[:16],
  }


def image_content(
  tokenizer: Tokenizer, image: np.ndarray, name: str
) -> dict[str, Any]:
  """An image, uint8 [h, w, 3], with its tokens and reconstructions.

  Returns:
    JSON values. Of each level (code of a position, or scale) `ids` has the
    flattened grid and `grids` its rows, columns and pixels per token;
    `reconstructions` has one per prefix of the levels where they decode, else
    one.
  """
  image = shrink(image)
  height, width = image.shape[:2]
  ids = encode_images(tokenizer, image[None])
  prefixes = [ids[..., :n] for n in tokenizer.prefixes] or [ids]
  made = [decode_ids(tokenizer, part, height, width)[0] for part in prefixes]
  if tokenizer.sides:
    levels = np.split(ids[0], tokenizer.prefixes[:-1])
    grids = [[side, side, height / side] for side in tokenizer.sides]
  else:
    levels = ids[0].reshape(-1, _levels(tokenizer)).T
    grids = [[*ids.shape[1:3], tokenizer.factor]] * len(levels)
  errors = [np.mean((x.astype(float) - image) ** 2) for x in made]
  floor = 1 / image.size
  return {
    'name': name,
    'width': width,
    'height': height,
    'grids': grids,
    'ids': [level.tolist() for level in levels],
    'original': data_url(image),
    'reconstructions': [data_url(x) for x in made],
    'psnr': [10 * np.log10(255**2 / max(x, floor)) for x in errors],
  }


def code_vectors(tokenizer: Tokenizer, level: int) -> np.ndarray:
  """Quantized vectors [K, C] of the codes of a level, code 0 elsewhere.

  Of multi-scale tokens: the codes themselves [K, D].
  """
  size, codes = tokenizer.codebook_size, tokenizer.codes_per_position
  ids = jnp.arange(size)
  if codes:
    ids = jnp.zeros((size, codes), jnp.int32).at[:, level].set(ids)

  def vectors(model):
    if tokenizer.sides:
      return model.vq.codes()
    return model.vq.codes_from_ids(ids)

  apply = tokenizer.model.apply
  return np.asarray(apply(tokenizer.variables, method=vectors))


def codes_content(
  tokenizer: Tokenizer, images: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The codes that images of `image_content` use.

  Returns:
    Per level (one for all scales): `neighbors`, id -> [[id, distance], ...],
    and where a code can be decoded alone, `sheet`, a picture of swatches, and
    `swatches`, id -> [x, y] of its pixels there, `side` pixels per side.
  """
  ids = [
    np.concatenate(x) for x in zip(*(x['ids'] for x in images), strict=True)
  ]
  result = []
  for level, own in enumerate(
    [np.concatenate(ids)] if tokenizer.sides else ids
  ):
    used = np.unique(own).tolist()
    near = _nearest(code_vectors(tokenizer, level), used)
    result.append({'neighbors': near})
    if level == 0 and tokenizer.config['model.quantizer'] != 'product':
      shown = {i for pairs in near.values() for i, _ in pairs}
      result[0] |= _sheet(tokenizer, sorted(shown.union(used)))
  return result


def _nearest(vectors, used) -> dict[str, list]:
  """The codes nearest to each of those used, nearest first."""
  norms = (vectors**2).sum(1)
  result = {}
  for code in used:
    squared = norms + norms[code] - 2 * vectors @ vectors[code]
    squared[code] = np.inf
    order = np.argsort(squared)[: min(_NEIGHBORS, len(norms) - 1)].tolist()
    distances = np.sqrt(np.maximum(squared[order], 0)).round(4).tolist()
    result[str(code)] = list(zip(order, distances, strict=True))
  return result


def _sheet(tokenizer, codes: list[int]) -> dict[str, Any]:
  """One picture of the codes, each decoded from a grid of itself.

  Of multi-scale tokens: the whole image, from the code as the first scale.
  """
  f, batch = tokenizer.factor, 128
  middle = slice(_GRID // 2 * f, (_GRID // 2 + 1) * f)
  rows = -(-len(codes) // _SHEET_COLUMNS)
  sheet = np.zeros((rows * _SWATCH, _SHEET_COLUMNS * _SWATCH, 3), np.uint8)
  swatches = {}
  for start in range(0, len(codes), batch):
    part = codes[start : start + batch]
    alone = np.resize(part, (batch, 1))
    if tokenizer.sides:
      alone = np.repeat(alone, tokenizer.prefixes[0], axis=1)
    else:
      alone = np.tile(alone[..., None], (_GRID, _GRID))
    if tokenizer.codes_per_position:
      alone = alone[..., None]
    images = np.asarray(to_uint8(tokenizer.decode(alone)))
    if not tokenizer.sides:
      images = images[:, middle, middle]
    for i, (code, image) in enumerate(zip(part, images, strict=False), start):
      y, x = (n * _SWATCH for n in divmod(i, _SHEET_COLUMNS))
      swatch = Image.fromarray(image).resize((_SWATCH, _SWATCH))
      sheet[y : y + _SWATCH, x : x + _SWATCH] = swatch
      swatches[str(code)] = [x, y]
  return {'sheet': data_url(sheet), 'side': _SWATCH, 'swatches': swatches}
