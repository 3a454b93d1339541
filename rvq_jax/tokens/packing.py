"""Ids to bytes: packed at ceil(log2 K) bits, or LZMA where that is shorter.

The codes of a trained model are used evenly over a data set, so counts that
are the model's own save nothing (1 % or less of the packed size; see
docs/formats.md). A single image uses few of them and repeats pairs, which LZMA
finds. It is in Python's standard library, and its raw format is fixed.
"""

import lzma

import numpy as np

PACKED, LZMA = 0, 1
CODINGS = (PACKED, LZMA)
_DICTIONARY = 2**20
_CHUNK = 2**16  # ids at a time: whole bytes, and few at once


def id_dtype(codebook_size: int) -> np.dtype:
  """The smallest little-endian unsigned integer that holds ids below K."""
  for kind in ('u1', '<u2', '<u4'):
    if codebook_size - 1 <= np.iinfo(kind).max:
      return np.dtype(kind)
  raise ValueError(f'expected at most 2^32 codes, got {codebook_size}')


def packed_bits(codebook_size: int) -> int:
  """Bits of an id at fixed length: ceil(log2 K)."""
  return (codebook_size - 1).bit_length()


def pack(ids: np.ndarray, codebook_size: int) -> bytes:
  """Writes ids at `packed_bits` each, the most significant bit first.

  Args:
    ids: integers in [0, K), of any shape.
    codebook_size: K.

  Returns:
    ceil(ids.size * packed_bits / 8) bytes; the last bits are zero.
  """
  shifts = _shifts(codebook_size)
  flat = ids.reshape(-1, 1).astype(np.uint32)
  return b''.join(
    np.packbits((flat[i : i + _CHUNK] >> shifts) & np.uint32(1)).tobytes()
    for i in range(0, len(flat), _CHUNK)
  )


def unpack(data: bytes, count: int, codebook_size: int) -> np.ndarray:
  """Reads `count` ids that `pack` wrote: uint32 [count].

  Raises:
    ValueError: there are more or fewer bytes than that many ids take.
  """
  shifts = _shifts(codebook_size)
  expected = -(-count * len(shifts) // 8)
  if len(data) != expected:
    raise ValueError(
      f'expected {expected} bytes of packed ids, got {len(data)}'
    )
  ids = np.zeros(count, np.uint32)
  for i in range(0, count, _CHUNK):
    part = ids[i : i + _CHUNK]
    start = i * len(shifts) // 8
    bits = np.unpackbits(
      np.frombuffer(data, np.uint8)[start : start + _CHUNK * len(shifts) // 8],
      count=len(part) * len(shifts),
    ).reshape(len(part), len(shifts))
    part[:] = (bits.astype(np.uint32) << shifts).sum(axis=1)
  return ids


def _shifts(codebook_size: int) -> np.ndarray:
  """The place of each bit of an id, the most significant first."""
  return np.arange(packed_bits(codebook_size), dtype=np.uint32)[::-1]


def _filters(dtype: np.dtype) -> list[dict]:
  """Raw LZMA1 that knows where in an integer a byte stands."""
  place = dtype.itemsize.bit_length() - 1
  return [
    {
      'id': lzma.FILTER_LZMA1,
      'dict_size': _DICTIONARY,
      'lc': 0,
      'lp': place,
      'pb': place,
      'nice_len': 273,
      'depth': 1000,
    }
  ]


def compress(ids: np.ndarray, codebook_size: int) -> tuple[int, bytes]:
  """Codes ids in the shorter of the two ways.

  Args:
    ids: integers in [0, K), of any shape.
    codebook_size: K.

  Returns:
    PACKED or LZMA, and the bytes.
  """
  packed = pack(ids, codebook_size)
  dtype = id_dtype(codebook_size)
  coded = lzma.compress(
    ids.astype(dtype).tobytes(),
    format=lzma.FORMAT_RAW,
    filters=_filters(dtype),
  )
  return (LZMA, coded) if len(coded) < len(packed) else (PACKED, packed)


def decompress(
  coding: int, data: bytes, count: int, codebook_size: int
) -> np.ndarray:
  """Reads what `compress` wrote; never makes more than `count` ids.

  Args:
    coding: PACKED or LZMA.
    data: the bytes.
    count: ids in them.
    codebook_size: K.

  Returns:
    ids uint32 [count], each in [0, K).

  Raises:
    ValueError: the bytes are not `count` such ids.
  """
  if coding == PACKED:
    ids = unpack(data, count, codebook_size)
  else:
    dtype = id_dtype(codebook_size)
    size = count * dtype.itemsize
    try:
      decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(dtype))
      plain = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
      raise ValueError(f'the coded ids are damaged: {error}') from error
    if len(plain) != size or not decoder.eof or decoder.unused_data:
      raise ValueError(
        f'expected {size} bytes of ids, the coded data hold another number'
      )
    ids = np.frombuffer(plain, dtype).astype(np.uint32)
  if count and int(ids.max()) >= codebook_size:
    raise ValueError(
      f'expected ids below {codebook_size}, got {int(ids.max())}'
    )
  return ids
