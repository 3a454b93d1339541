"""The content of the page: JSON values, and pictures as data URLs."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer.tiling import decode_ids, encode_images
from rvq_jax.tokenizer.tokenizer import Tokenizer

MAX_SIDE = 512  # larger images shrink: the page holds them all
_NEIGHBORS = 8
_SWATCH, _SHEET_COLUMNS = 16, 32  # pixels per side, swatches per row
_GRID = 3  # positions per side of the grid for a single code


def data_url(image: np.ndarray) -> str:
  """A PNG data URL of an image, uint8 [h, w, 3]."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG', optimize=True)
  return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def shrink(image: np.ndarray) -> np.ndarray:
  """Shrinks the longer side to at most MAX_SIDE; uint8 [h, w, 3]."""
  picture = Image.fromarray(image)
  picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
  return np.asarray(picture)


def model_content(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
  """The page's facts about the model."""
  ids = np.zeros((1, *tokenizer.ids_shape(1, 1)), int)
  return {
    'name': name,
    'step': tokenizer.step,
    'codebookSize': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'levels': len(tokenizer.levels(ids)),
    'nested': bool(tokenizer.prefixes),
    'sides': tokenizer.sides,
    'quantizer': tokenizer.quantizer,
    'hash': tokenizer.model_hash[:16],
  }


def image_content(
  tokenizer: Tokenizer, image: np.ndarray, name: str
) -> dict[str, Any]:
  """An image, uint8 [h, w, 3], with its tokens and reconstructions, as JSON.

  Per level (code of a position, or scale) `ids` has the flattened grid and
  `grids` its rows, columns and pixels per token. `reconstructions` has one
  picture per decodable prefix, or only one.
  """
  image = shrink(image)
  height, width = image.shape[:2]
  ids = encode_images(tokenizer, image[None])
  prefixes = [ids[..., :n] for n in tokenizer.prefixes] or [ids]
  pictures = [decode_ids(tokenizer, x, height, width)[0] for x in prefixes]
  errors = [np.mean((x.astype(float) - image) ** 2) for x in pictures]
  levels = [level[0] for level in tokenizer.levels(ids)]
  pixels = tokenizer.factor * len(levels[-1])
  return {
    'name': name,
    'width': width,
    'height': height,
    'grids': [[*x.shape, pixels / len(x)] for x in levels],
    'ids': [level.ravel().tolist() for level in levels],
    'original': data_url(image),
    'reconstructions': [data_url(x) for x in pictures],
    'psnr': [10 * np.log10(255**2 / max(x, 1 / image.size)) for x in errors],
  }


def codes_content(
  tokenizer: Tokenizer, images: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The codes in images of `image_content`.

  Each codebook has `neighbors`, id -> [[id, distance], ...]. The first, if its
  codes decode without others, also has `sheet`, a picture of swatches of `side`
  pixels, and `swatches`, id -> [x, y] in that picture.
  """
  books = tokenizer.codebooks()
  levels = zip(*(x['ids'] for x in images), strict=True)
  used = [set().union(*ids) for ids in levels]
  if len(books) == 1:
    used = [set().union(*used)]
  result = [
    {'neighbors': _nearest(np.asarray(book), sorted(codes))}
    for book, codes in zip(books, used, strict=True)
  ]
  if tokenizer.prefixes or len(books) == 1:
    near = result[0]['neighbors'].values()
    shown = {i for pairs in near for i, _ in pairs}.union(used[0])
    result[0] |= _sheet(tokenizer, sorted(shown))
  return result


def _nearest(vectors, used) -> dict[str, list]:
  """The nearest codes of each used code, nearest first."""
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

  Multi-scale: the whole image, with the code as the first scale.
  """
  f, batch, side = tokenizer.factor, 128, _GRID
  middle = slice(_GRID // 2 * f, (_GRID // 2 + 1) * f)
  if not tokenizer.any_size:
    side, middle = tokenizer.sides[0], slice(None)
  rows = -(-len(codes) // _SHEET_COLUMNS)
  sheet = np.zeros((rows * _SWATCH, _SHEET_COLUMNS * _SWATCH, 3), np.uint8)
  swatches = {}
  for start in range(0, len(codes), batch):
    part = codes[start : start + batch]
    # Fill the last batch: another shape would compile again.
    grids = np.tile(np.resize(part, (batch, 1, 1)), (side, side))
    images = to_uint8(tokenizer.decode(tokenizer.join([grids])))
    images = np.asarray(images)[:, middle, middle]
    for i, (code, image) in enumerate(zip(part, images, strict=False), start):
      y, x = (n * _SWATCH for n in divmod(i, _SHEET_COLUMNS))
      swatch = Image.fromarray(image).resize((_SWATCH, _SWATCH))
      sheet[y : y + _SWATCH, x : x + _SWATCH] = swatch
      swatches[str(code)] = [x, y]
  return {'sheet': data_url(sheet), 'side': _SWATCH, 'swatches': swatches}
