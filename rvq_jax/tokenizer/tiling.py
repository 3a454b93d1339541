"""Images of any size to ids and back, in bounded memory.

A grid of at most WINDOW x WINDOW positions (with GroupNorm, which sees the
whole image, of at most PIECE pixels) is coded in one piece and equals
`Tokenizer.reconstruct` bit-exactly. A larger grid is coded in windows, with the
same ids and picture up to float32 rounding: windows overlap by the reach of the
convolutions, and GroupNorm takes its statistics, attention its keys and values
from the whole image. If a grid has more than KEYS positions, keys and values
come from every second (third ...) row and column. Multi-scale tokens have one
size and no windows.
"""

import functools
import io
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.io import write_atomic
from rvq_jax.metrics import prepare_images, to_uint8
from rvq_jax.models.layers import SelfAttention
from rvq_jax.tokenizer.tokenizer import Tokenizer

WINDOW, HALO, KEYS, PIECE = 64, 8, 2**14, 2**20
_MAX_BYTES = 2**28


def spans(size: int, side: int, halo: int) -> list[tuple[int, int, int]]:
  """The windows (start, first, last) along `size` positions.

  A window is min(size, side) long and keeps the positions first ... last - 1,
  at least `halo` from its inner borders.
  """
  if size <= side:
    return [(0, 0, size)]
  windows, first = [], 0
  while first < size:
    start = min(max(first - halo, 0), size - side)
    last = size if start + side == size else start + side - halo
    windows.append((start, first, last))
    first = last
  return windows


def _in_one_piece(tokenizer, grid):
  if not tokenizer.any_size or max(grid) <= WINDOW:
    return True
  pixels = math.prod(grid) * tokenizer.factor**2
  # Windows take a pass per norm: tens of times as long.
  return tokenizer.model.encoder.norm != 'batch' and pixels <= PIECE


def _encode(model, images):
  return model.encode(prepare_images(images))


def _decode(model, ids):
  return to_uint8(model.decode(ids))


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def _code(variables, x, *, model, method):
  with nn.intercept_methods(functools.partial(_layer, None)):
    return model.apply(variables, x, method=method)


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def _survey(variables, x, kept, *, model, method):
  """The collection 'whole' as seen from one window x; see `_layer`."""
  with nn.intercept_methods(functools.partial(_layer, kept)):
    _, written = model.apply(variables, x, method=method, mutable='whole')
  return written.get('whole', {})


def _layer(kept, call, args, kwargs, context):
  """Calls a layer; GroupNorm and attention use the collection 'whole'.

  Its variable 'map' holds, for a GroupNorm, the means [2, B, groups] of x and
  x^2, for attention the positions [B, h, w, C] for keys and values; without it
  a layer sees only x. With kept, bool [H, W], this writes 'map': the means over
  the kept positions of a window, or all its positions.
  """
  layer = context.module
  if not isinstance(layer, nn.GroupNorm | SelfAttention):
    return call(*args, **kwargs)
  (x,), whole = args, layer.get_variable('whole', 'map')
  if isinstance(layer, SelfAttention):
    own, y = x, call(x, whole)
  else:
    own = None if kept is None else _means(layer, x, kept)
    y = call(x) if whole is None else _normalize(layer, x, whole)
  if kept is not None:
    layer.put_variable('whole', 'map', own)
  return y


def _groups(norm, x):
  return x.astype(jnp.float32).reshape(*x.shape[:3], norm.num_groups, -1)


def _means(norm, x, kept):
  zoom, groups = x.shape[1] // kept.shape[0], _groups(norm, x)
  kept = kept.repeat(zoom, 0).repeat(zoom, 1)[None, :, :, None, None]
  means = [y.mean((1, 2, 4), where=kept) for y in (groups, groups**2)]
  return jnp.stack(means)


def _normalize(norm, x, means):
  mean, square = means[:, :, None, None, :, None]
  variance = jnp.maximum(square - mean**2, 0)
  y = (_groups(norm, x) - mean) * jax.lax.rsqrt(variance + norm.epsilon)
  scale, bias = (norm.get_variable('params', n) for n in ('scale', 'bias'))
  y = y.reshape(-1, x.shape[-1]) * scale[None] + bias[None]
  return y.reshape(x.shape).astype(norm.dtype)


def _by_windows(tokenizer, method, x, result, placement=None):
  """Fills `result`: the ids of images x by `_encode`, or back by `_decode`."""
  model, f, g = tokenizer.model, tokenizer.factor, 1  # pixels per position
  coder = model.encoder
  if method is _decode:
    coder, f, g = model.decoder, 1, f
  halo = max(HALO, coder.reach)
  side, grid = max(WINDOW, 4 * halo), [n // f for n in x.shape[1:3]]
  windows = list(itertools.product(*(spans(n, side, halo) for n in grid)))
  options = {'model': model, 'method': method}

  def window(y, z):
    part = x[:, y * f : (y + side) * f, z * f : (z + side) * f]
    return jax.device_put(part, placement)

  def survey(variables, rows, columns):
    (y, top, bottom), (z, left, right) = rows, columns
    kept = np.zeros([min(n, side) for n in grid], bool)
    kept[top - y : bottom - y, left - z : right - z] = True
    return _survey(variables, window(y, z), kept, **options)

  variables = dict(tokenizer.variables)
  layers = jax.eval_shape(functools.partial(survey, variables, *windows[0]))
  for _ in jax.tree.leaves(layers):  # each pass makes one more layer right
    parts = (survey(variables, *pair) for pair in windows)
    whole = _join(zip(windows, parts, strict=True), grid, side)
    variables['whole'] = jax.device_put(whole)
  for (y, top, bottom), (z, left, right) in windows:
    part = np.asarray(_code(variables, window(y, z), **options))
    part = part[:, (top - y) * g : (bottom - y) * g]
    kept = result[:, top * g : bottom * g, left * g : right * g]
    kept[:] = part[:, :, (left - z) * g : (right - z) * g]
  return result


def _join(surveys, grid, side):
  """The collection 'whole' of a grid, from (window, its `_survey`).

  Attention above the lowest level has `zoom` times the positions per side.
  """
  joined = {}
  for ((y, top, bottom), (z, left, right)), survey in surveys:
    share = (bottom - top) * (right - left) / math.prod(grid)
    for name, own in flatten_dict(survey).items():
      own = np.asarray(own, np.float32)
      if own.ndim == 3:
        joined[name] = joined.get(name, 0) + share * own.astype(np.float64)
        continue
      zoom = own.shape[1] // min(grid[0], side)
      step = math.ceil(zoom * math.sqrt(math.prod(grid) / KEYS))
      shape = [-(-n * zoom // step) for n in grid]
      shape = own.shape[0], *shape, own.shape[3]
      keys = joined.setdefault(name, np.empty(shape, np.float32))
      row, column = -(-top * zoom // step), -(-left * zoom // step)
      own = own[:, row * step - y * zoom : (bottom - y) * zoom : step]
      own = own[:, :, column * step - z * zoom : (right - z) * zoom : step]
      height, width = own.shape[1:3]
      keys[:, row : row + height, column : column + width] = own
  return unflatten_dict({n: np.float32(x) for n, x in joined.items()})


def encode_images(
  tokenizer: Tokenizer, images: np.ndarray, *, placement=None
) -> np.ndarray:
  """Ids of images of any size: `axes`, `ids_dtype`, H = ceil(h / factor).

  Args:
    images: uint8 [B, h, w, 3]; the last row and column repeat until the factor
      divides both sides.
    placement: sharding of the images; None: one device.
  """
  f, (height, width) = tokenizer.factor, images.shape[1:3]
  padding = (0, 0), (0, -height % f), (0, -width % f), (0, 0)
  images = np.pad(images, padding, 'edge')
  if _in_one_piece(tokenizer, [n // f for n in images.shape[1:3]]):
    whole = tokenizer.encode(jax.device_put(images, placement))
    return np.asarray(whole, tokenizer.ids_dtype)
  shape = len(images), *tokenizer.ids_shape(height, width)
  ids = np.empty(shape, tokenizer.ids_dtype)
  return _by_windows(tokenizer, _encode, images, ids, placement)


def decode_ids(
  tokenizer: Tokenizer, ids: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Images uint8 [B, height, width, 3] of ids as from `encode_images`.

  height is at most H factor, width at most W factor; surplus pixels go.
  """
  f, ids = tokenizer.factor, np.asarray(tokenizer.check_ids(ids), np.int32)
  if _in_one_piece(tokenizer, ids.shape[1:3]):
    images = np.asarray(to_uint8(tokenizer.decode(ids)))
  else:
    shape = len(ids), ids.shape[1] * f, ids.shape[2] * f, 3
    images = _by_windows(tokenizer, _decode, ids, np.empty(shape, np.uint8))
  return images[:, :height, :width]


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
