"""Images in shards: files and splits of wds:PATTERN and parquet:PATTERN.

PATTERN is a file, a folder, or a path with {000..099}, {a,b} and wildcards.
"""

import glob
import itertools
import logging
import os
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rvq_jax.data.folders import printable
from rvq_jax.data.sources import SPLITS, Source

_BRACES = re.compile(r'\{([^{}]*(?:,|\.\.)[^{}]*)\}')
_SPLIT = re.compile('(?:^|[^a-z])(train|valid|val|validation|test)(?![a-z])')
_ENDINGS = {'parquet': ['.parquet'], 'wds': ['.tar', '.tgz']}
_ENDINGS['wds'] += ['.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst']  # refused


class Names(Sequence):
  """An Arrow array of names as text, without a Python object per name."""

  def __init__(self, array: pa.Array, prefix: str = ''):
    self.array, self._prefix = array, prefix

  def __len__(self):
    return len(self.array)

  def __getitem__(self, index):
    return self._prefix + os.fsdecode(self.array[int(index)].as_py())


class ShardSource(Source):
  """Images in `files`, image i in files[shards[i]]; `keys` are their names.

  A damaged record is an OSError; a file that changed since it was opened is a
  ValueError, which ends the work. `file_stamps` are size and time of each file.
  """

  def __init__(
    self, split, files, file_stamps, shards, names: pa.Array, labels
  ):
    self.split, self.files, self.file_stamps = split, files, file_stamps
    self.shards, self.keys = shards, Names(names)
    self.labels = np.ascontiguousarray(labels, np.int32)

  def __len__(self):
    return len(self.shards)

  def identity(self):
    """The keys, after their split."""
    prefix = '' if self.split == 'all' else f'{self.split}/'
    return Names(self.keys.array, prefix)

  def stamps(self):
    """See `Source`: the stamps of the files."""
    return np.array(self.file_stamps, np.int64)[self.shards]

  def read(self, shard: int, size: int, offset: int) -> bytes:
    """Bytes of a file; ValueError if it has changed."""
    with open(self.files[shard], 'rb', buffering=0) as file:
      if stamp(os.fstat(file.fileno())) != self.file_stamps[shard]:
        path = printable(self.files[shard])
        raise ValueError(f'{path} changed in use; start the same command again')
      return os.pread(file.fileno(), size, offset)


def stamp(status: os.stat_result) -> tuple[int, int]:
  """Size and time of change of a file."""
  return status.st_size, status.st_mtime_ns


def find_files(kind: str, pattern: str) -> dict[str, list[str]]:
  """The files of a pattern by split; `kind` is 'wds' or 'parquet'.

  The names of files, or of their folders below the common one, name the splits.
  If one file names none, all images are the split 'all'.
  """
  files, found = _list(kind, pattern), {}
  shared = os.path.commonpath([*map(os.path.dirname, files)])
  for file in files:
    folder, name = os.path.split(os.path.relpath(file, shared))
    found.setdefault(_split(name) or _split(folder), []).append(file)
  found = {'all': files} if None in found else found
  found = {split: found[split] for split in ('all', *SPLITS) if split in found}
  counts = [f'{split} {len(found[split]):,}' for split in found]
  logging.info('%s: %s files', printable(pattern), ', '.join(counts))
  return found


def _split(name: str) -> str | None:
  """The split in the name of a file or folder, or None."""
  match = _SPLIT.search(name.lower())
  split = match and match[1]
  return 'validation' if split in ('val', 'valid') else split


def _list(kind: str, pattern: str) -> list[str]:
  """The absolute paths of the files of a pattern, sorted."""
  if re.match('[a-z][a-z0-9+.-]*:', pattern, re.I):
    raise ValueError(
      f'{kind}: expected local files, got {pattern}; download them first'
    )
  path = os.path.abspath(os.path.expanduser(pattern))
  if os.path.isdir(path):
    parts = [f'{glob.escape(path)}/*{ending}' for ending in _ENDINGS[kind]]
    found = [glob.glob(part) for part in parts]
  else:
    parts = _expand(path)
    found = [[x] if os.path.exists(x) else glob.glob(x) for x in parts]
    if [] in found:
      missing = printable(parts[found.index([])])
      raise ValueError(f'{kind}: there is no {missing}')
  if not any(found):
    raise ValueError(f'{printable(path)} holds no {_ENDINGS[kind][0]} files')
  return sorted({*itertools.chain(*found)})


def _expand(pattern: str) -> list[str]:
  """The patterns of one with braces: {000..099}, {a,b}."""
  match = None if os.path.exists(pattern) else _BRACES.search(pattern)
  if not match:
    return [pattern]
  parts, ends = match[1].split(','), re.match(r'(\d+)\.\.(\d+)$', match[1])
  if ends:
    numbers = range(int(ends[1]), int(ends[2]) + 1)
    parts = [f'{i:0{len(ends[1])}d}' for i in numbers]
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [x for part in parts for x in _expand(before + part + after)]
