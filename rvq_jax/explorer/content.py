"""What the explorer's page shows, as JSON values and pictures in data URLs."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.metrics import to_uint8
from rvq_jax.tokens.tiling import decode_ids, encode_images

MAX_SIDE = 512
"""Images are shrunk to this many pixels a side: the page holds them all."""

_NEIGHBOURS = 8
_SWATCH = 16  # pixels a side in the sheet of codes
_AROUND = 3  # positions a side of the grid that a single code is decoded from


def data_url(image: np.ndarray) -> str:
  """An image, uint8 [h, w, 3], as the URL of a PNG that holds it."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG', optimize=True)
  return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def shrink(image: np.ndarray) -> np.ndarray:
  """The image with its longer side at most MAX_SIDE, uint8 [h, w, 3]."""
  picture = Image.fromarray(image)
  picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
  return np.asarray(picture)


def model_content(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
  """What the page says of the model."""
  config = tokenizer.config
  return {
    'name': name,
    'step': tokenizer.step,
    'codebookSize': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'codes': tokenizer.codes_per_position or 1,
    'residual': config['model.quantizer'] == 'residual',
    'quantizer': config['model.quantizer'],
    'hash': tokenizer.model_hash[:16],
  }


def image_content(
  tokenizer: Tokenizer, image: np.ndarray, name: str
) -> dict[str, Any]:
  """An image with its tokens and reconstructions.

  Args:
    tokenizer: the model.
    image: uint8 [h, w, 3].
    name: to call it by.

  Returns:
    JSON values. `ids` is the grid in a row, L numbers a position;
    `reconstructions` has one for each depth of a residual tokenizer, else one.
  """
  image = shrink(image)
  height, width = image.shape[:2]
  ids = encode_images(tokenizer, image[None])
  depths = [ids]
  if tokenizer.config['model.quantizer'] == 'residual':
    depths = [ids[..., :depth] for depth in range(1, ids.shape[-1] + 1)]
  made = [decode_ids(tokenizer, part, height, width)[0] for part in depths]
  errors = [np.mean((x.astype(float) - image) ** 2) for x in made]
  floor = 1 / image.size
  return {
    'name': name,
    'width': width,
    'height': height,
    'rows': ids.shape[1],
    'columns': ids.shape[2],
    'ids': ids.reshape(-1).tolist(),
    'original': data_url(image),
    'reconstructions': [data_url(x) for x in made],
    'psnr': [10 * np.log10(255**2 / max(x, floor)) for x in errors],
  }


def code_vectors(tokenizer: Tokenizer, level: int) -> np.ndarray:
  """A vector for each code: what quantizing to it, and else to zeros, gives.

  Distances between them are those between the codes of that level or head,
  whatever the quantizer.

  Args:
    tokenizer: the model.
    level: which of the codes of a position.

  Returns:
    float32 [K, C].
  """
  size, codes = tokenizer.codebook_size, tokenizer.codes_per_position
  ids = jnp.arange(size)
  if codes:
    ids = jnp.zeros((size, codes), jnp.int32).at[:, level].set(ids)
  return np.asarray(
    tokenizer.model.apply(
      tokenizer.variables,
      ids,
      method=lambda model, ids: model.vq.codes_from_ids(ids),
    )
  )


def codes_content(
  tokenizer: Tokenizer, images: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The codes that images use, with their neighbours and what they look like.

  Args:
    tokenizer: the model.
    images: from `image_content`.

  Returns:
    For each code of a position: `neighbours`, id -> [[id, distance], ...], and
    where a code can be decoded alone, `sheet`, a picture of `places`, id ->
    number of the `side` x `side` pixels, `columns` in a row.
  """
  levels = tokenizer.codes_per_position or 1
  ids = np.concatenate(
    [np.reshape(image['ids'], (-1, levels)) for image in images]
  )
  found = []
  for level in range(levels):
    used = np.unique(ids[:, level])
    near = _nearest(code_vectors(tokenizer, level), used)
    content = {'neighbours': near}
    if level == 0 and tokenizer.config['model.quantizer'] != 'product':
      shown = {i for pairs in near.values() for i, _ in pairs}
      content |= _sheet(tokenizer, sorted(shown | set(used.tolist())))
    found.append(content)
  return found


def _nearest(vectors, used) -> dict[str, list]:
  """The codes nearest to each of those used, nearest first."""
  norms = (vectors**2).sum(1)
  result = {}
  for start in range(0, len(used), 256):
    part = used[start : start + 256]
    squared = norms + norms[part, None] - 2 * vectors[part] @ vectors.T
    squared[np.arange(len(part)), part] = np.inf
    order = np.argsort(squared, axis=1)[:, : min(_NEIGHBOURS, len(norms) - 1)]
    for row, i in enumerate(part):
      distances = np.sqrt(np.maximum(squared[row, order[row]], 0))
      pairs = zip(order[row].tolist(), distances.tolist(), strict=True)
      result[str(i)] = [[j, round(distance, 4)] for j, distance in pairs]
  return result


def _sheet(tokenizer, codes: list[int]) -> dict[str, Any]:
  """The codes decoded from grids of nothing else, side by side."""
  columns, f = 32, tokenizer.factor
  pictures = np.concatenate(list(_decoded_alone(tokenizer, codes)))
  middle = slice(_AROUND // 2 * f, (_AROUND // 2 + 1) * f)
  pictures = pictures[: len(codes), middle, middle]
  rows = -(-len(codes) // columns)
  sheet = np.zeros((rows * _SWATCH, columns * _SWATCH, 3), np.uint8)
  for place, picture in enumerate(pictures):
    y, x = (n * _SWATCH for n in divmod(place, columns))
    resized = Image.fromarray(picture).resize((_SWATCH, _SWATCH))
    sheet[y : y + _SWATCH, x : x + _SWATCH] = resized
  return {
    'sheet': data_url(sheet),
    'side': _SWATCH,
    'columns': columns,
    'places': {str(code): place for place, code in enumerate(codes)},
  }


def _decoded_alone(tokenizer, codes) -> Iterable[jax.Array]:
  """Decodes grids of one code each, as many at a time."""
  batch = 128
  codes = np.array(codes)
  for start in range(0, len(codes), batch):
    part = np.resize(codes[start : start + batch], batch)  # one size: one jit
    shape = (batch, _AROUND, _AROUND) + (
      (1,) if tokenizer.codes_per_position else ()
    )
    part = part.reshape((batch,) + (1,) * (len(shape) - 1))
    images = tokenizer.decode(jnp.asarray(np.broadcast_to(part, shape)))
    yield np.asarray(to_uint8(images))
