"""The single-image format `.rvq`; docs/formats.md describes every byte."""

import dataclasses
import os
import struct
import zlib

import numpy as np

from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.tokens import packing
from rvq_jax.tokens.tiling import grid_shape

MAGIC, VERSION = b'\x89RVQ', 1
HASH_BYTES = 8
_HEADER = struct.Struct(f'<4sBBBBHHHHI{HASH_BYTES}s')
_CHECKSUM = struct.Struct('<I')
MAX_SIDE = 2**16 - 1
"""Longest side in pixels that the format can say."""

MAX_IDS = 2**24
"""Most ids in a file."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenImage:
  """An image as tokens.

  Attributes:
    ids: [H, W, L], integers in [0, K); L codes a position.
    height: of the image in pixels; H factor or a little less.
    width: of the image in pixels.
    factor: pixels along the side of a token.
    codebook_size: K.
    model_hash: first HASH_BYTES of the model's hash.
  """

  ids: np.ndarray
  height: int
  width: int
  factor: int
  codebook_size: int
  model_hash: bytes


def to_bytes(image: TokenImage) -> bytes:
  """The content of an .rvq file.

  Args:
    image: what to write.

  Returns:
    Header, ids and checksum.

  Raises:
    ValueError: the image is too large for the format.
  """
  rows, columns, codes = image.ids.shape
  if image.ids.size > MAX_IDS:
    raise ValueError(
      f'expected an image of at most {MAX_IDS} ids, got {image.ids.size}; '
      'shrink it'
    )
  if max(image.height, image.width) > MAX_SIDE:
    raise ValueError(
      f'expected an image of at most {MAX_SIDE} pixels a side, got '
      f'{image.width} x {image.height}; shrink it'
    )
  coding, payload = packing.compress(image.ids, image.codebook_size)
  header = _HEADER.pack(
    *(MAGIC, VERSION, coding, codes, image.factor),
    *(image.height, image.width, rows, columns),
    *(image.codebook_size, image.model_hash),
  )
  data = header + payload
  return data + _CHECKSUM.pack(zlib.crc32(data))


def from_bytes(data: bytes, name: str = 'data') -> TokenImage:
  """Reads the content of an .rvq file.

  Args:
    data: the whole file.
    name: what to call it in an error.

  Returns:
    The image.

  Raises:
    ValueError: it is not such a file, is damaged, or says what cannot be.
  """
  if data[: len(MAGIC)] != MAGIC:
    raise ValueError(
      f'{name}: expected an .rvq file, which begins with {MAGIC!r}, got '
      f'{data[: len(MAGIC)]!r}'
    )
  if len(data) < _HEADER.size + _CHECKSUM.size:
    raise ValueError(f'{name} is cut off after {len(data)} bytes; get it anew')
  body, end = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
  if zlib.crc32(body) != _CHECKSUM.unpack(end)[0]:
    raise ValueError(
      f'{name} is damaged or cut off: its checksum is wrong; get it anew'
    )
  fields = _HEADER.unpack_from(body)
  _check_header(name, *fields[1:10])
  _, _, coding, codes, factor, height, width, rows, columns, size, model = (
    fields
  )
  try:
    ids = packing.decompress(
      coding, body[_HEADER.size :], rows * columns * codes, size
    )
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  return TokenImage(
    ids.reshape(rows, columns, codes), height, width, factor, size, model
  )


def _check_header(
  name, version, coding, codes, factor, height, width, rows, columns, size
):
  """Refuses a header before anything of the size it claims is made."""
  if version != VERSION:
    raise ValueError(
      f'{name}: expected version {VERSION} of the format, got {version}; '
      'a newer rvq_jax may read it'
    )
  sound = (
    coding in packing.CODINGS
    and 1 <= rows * columns * codes <= MAX_IDS
    and factor > 1
    and 1 <= height * width <= MAX_PIXELS
    and (rows, columns) == grid_shape(height, width, factor)
    and 1 <= size < 2**31
  )
  if not sound:
    raise ValueError(
      f'{name}: expected at most {MAX_PIXELS} pixels and {MAX_IDS} ids, in '
      f'one of the codings {packing.CODINGS}; its header says '
      f'{width} x {height} pixels as {columns} x {rows} positions of {codes} '
      f'codes, factor {factor}, K = {size}, coding {coding}'
    )


def read(path) -> TokenImage:
  """Reads an .rvq file.

  Args:
    path: of the file.

  Returns:
    The image.

  Raises:
    ValueError: the file cannot be read, or see `from_bytes`.
  """
  try:
    with open(path, 'rb') as stream:
      size = os.fstat(stream.fileno()).st_size
      start = stream.read(_HEADER.size)
      if start[: len(MAGIC)] != MAGIC or len(start) < _HEADER.size:
        return from_bytes(start, str(path))  # which says what is wrong
      longest = _longest(start)
      if size > longest:
        raise ValueError(
          f'{path} is damaged: its header allows {longest} bytes, it has {size}'
        )
      return from_bytes(start + stream.read(size - len(start)), str(path))
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error


def _longest(start: bytes) -> int:
  """Bytes that a file with this header has at most."""
  fields = _HEADER.unpack(start)
  count = fields[3] * fields[7] * fields[8]
  bits = packing.packed_bits(max(1, fields[9]))
  longest = min(-(-count * bits // 8), 4 * MAX_IDS)
  return _HEADER.size + longest + _CHECKSUM.size


def check_model(image: TokenImage, tokenizer: Tokenizer, name: str) -> None:
  """Refuses the tokens of another model.

  Args:
    image: the tokens.
    tokenizer: the model that shall decode them.
    name: of the file.

  Raises:
    ValueError: the hashes differ.
  """
  expected = bytes.fromhex(tokenizer.model_hash)[:HASH_BYTES]
  if image.model_hash != expected:
    raise ValueError(
      f'{name} was written with the model {image.model_hash.hex()}, and this '
      f'one is {expected.hex()}; give the --workdir and --step that it was '
      'encoded with'
    )
