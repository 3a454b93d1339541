"""The record of one image in a token shard: a MessagePack map.

docs/formats.md lists its fields.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np

from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.tokens.tiling import grid_shape


class TokenRecord(NamedTuple):
  """The tokens of one image.

  Attributes:
    ids: [H, W] or, with several codes a position, [H, W, L].
    height: of the image in pixels.
    width: of the image in pixels.
    name: of the image.
    label: its class, -1 where there is none.
    index: its place in the input.
  """

  ids: np.ndarray
  height: int
  width: int
  name: str
  label: int
  index: int


def to_bytes(record: TokenRecord, dtype: np.dtype) -> bytes:
  """A record as it is stored, its ids as `dtype`."""
  return msgpack.packb(
    {
      'ids': np.ascontiguousarray(record.ids, dtype).tobytes(),
      'shape': list(record.ids.shape),
      'size': [record.height, record.width],
      'name': record.name,
      'label': record.label,
      'index': record.index,
    }
  )


def from_bytes(data: bytes, card: Mapping[str, Any]) -> TokenRecord:
  """Reads a record.

  Args:
    data: the record.
    card: of its folder; says dtype, K, factor and codes.

  Returns:
    The record; `ids` cannot be written to.

  Raises:
    ValueError: it is none, its sizes do not agree, or an id is K or more.
  """
  try:
    fields = msgpack.unpackb(data)
    shape, size = tuple(fields['shape']), tuple(fields['size'])
    ids = np.frombuffer(fields['ids'], card['dtype']).reshape(shape)
    record = TokenRecord(
      ids, *size, fields['name'], fields['label'], fields['index']
    )
    whole = all(type(x) is int for x in (*shape, *size, *record[4:]))
    sound = whole and isinstance(record.name, str)
    codes = card.get('codes')
    sound = sound and shape[2:] == ((codes,) if codes else ())
    side = card.get('image_size')
    sound = sound and record.index >= 0 and side in (None, *size[:1])
    sound = sound and 1 <= size[0] * size[1] <= MAX_PIXELS
    sound = sound and shape[:2] == grid_shape(*size, card['factor'])
  # msgpack has a family of exceptions, and any of the fields may be anything.
  except Exception as error:
    raise ValueError(f'damaged token record: {error}') from error
  if not sound or min(size) < 1:
    raise ValueError(
      f'damaged token record: ids {shape} for an image of {size} pixels at '
      f'factor {card["factor"]}, name {str(record.name)[:40]!r}'
    )
  if int(ids.max()) >= card['codebook_size']:
    raise ValueError(
      f'expected ids below {card["codebook_size"]}, got {int(ids.max())}'
    )
  return record
