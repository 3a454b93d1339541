"""Token shards: ArrayRecord files, one record an image, and a JSON card."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from rvq_jax.tokens.card import CARD, read_card
from rvq_jax.tokens.records import TokenRecord, from_bytes

# Records that are compressed together: names and small grids shrink by half,
# and one of them is still read without much beside it.
_WRITER_OPTIONS = 'group_size:16'
_MEND = 'get it anew, or remove it and give the command that encoded it again'


def write_shard(path: Path, records: list[bytes]) -> dict[str, Any]:
  """Writes a shard; it has its name only once it is whole.

  Args:
    path: of the file.
    records: from `records.to_bytes`.

  Returns:
    The card's entry: file, images, bytes, sha256.

  Raises:
    OSError: it cannot be written.
    RuntimeError: that, as ArrayRecord says it.
  """
  partial = path.with_name(f'.{path.name}.partial')
  try:
    writer = array_record_module.ArrayRecordWriter(
      str(partial), _WRITER_OPTIONS
    )
    for record in records:
      writer.write(record)
    writer.close()
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
  return {
    'file': path.name,
    'images': len(records),
    'bytes': path.stat().st_size,
    'sha256': file_hash(path),
  }


def file_hash(path) -> str:
  """SHA-256 of a file in hex."""
  with open(path, 'rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


class TokenSource:
  """The token records of a folder, with random access.

  It serves as a data source of Grain: `grain.MapDataset.source(...)`.

  Args:
    folder: that launch/encode.py wrote.
    verify: compare the hash of every file first.

  Raises:
    ValueError: the folder is not whole, or a file is not what the card says.
  """

  def __init__(self, folder, *, verify: bool = True):
    self._folder = Path(folder)
    self.card = read_card(folder)
    if not self.card['complete']:
      raise ValueError(
        f'{folder} is not complete; run the command that encodes it again'
      )
    for shard in self.card['shards']:
      check_shard(self._folder, shard, verify=verify)
    self._ends = np.cumsum([shard['images'] for shard in self.card['shards']])
    if len(self) != self.card['images']:
      raise ValueError(
        f'{folder}: its card says {self.card["images"]} images, its shards '
        f'hold {len(self)}; encode the images again'
      )

  @functools.cached_property
  def _readers(self):
    paths = [self._folder / shard['file'] for shard in self.card['shards']]
    return [array_record_module.ArrayRecordReader(str(path)) for path in paths]

  def __len__(self):
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index) -> TokenRecord:
    if not 0 <= index < len(self):
      raise IndexError(f'expected an index below {len(self)}, got {index}')
    which = int(np.searchsorted(self._ends, index, side='right'))
    row = int(index - self._ends[which] + self.card['shards'][which]['images'])
    try:
      data = self._readers[which].read([row])[0]
    except RuntimeError as error:
      raise ValueError(f'{self._folder}: record {index}: {error}') from error
    return from_bytes(data, self.card)

  def __getstate__(self):
    # Readers are not picklable; a worker process opens its own.
    return {n: v for n, v in self.__dict__.items() if n != '_readers'}

  def __repr__(self):
    return f'TokenSource({str(self._folder)!r}, n={len(self)})'


def check_shard(folder, shard, *, verify: bool = True) -> None:
  """Refuses a file that is not the one in the card."""
  path = folder / shard['file']
  try:
    size = path.stat().st_size
    sound = size == shard['bytes']
    if sound and verify:
      sound = file_hash(path) == shard['sha256']
  except OSError as error:
    raise ValueError(
      f'cannot read {path}: {error.strerror}; get it anew, or give the command '
      'that encoded it again, which makes what is missing'
    ) from error
  if not sound:
    raise ValueError(
      f'{path} is damaged: its size or hash is not that in {CARD}; {_MEND}'
    )
  reader = array_record_module.ArrayRecordReader(str(path))
  count = reader.num_records()
  reader.close()
  if count != shard['images']:
    raise ValueError(
      f'{path}: {CARD} says {shard["images"]} images, the file holds {count}; '
      f'{_MEND}'
    )
