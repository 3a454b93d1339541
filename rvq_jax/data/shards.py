"""Images in shards, wds:PATTERN (tars) and parquet:PATTERN: files and splits.

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
import pyarrow.compute as pc

from rvq_jax.data.folders import printable
from rvq_jax.data.sources import SPLITS, Source

_BRACES = re.compile(r'\{([^{}]*(?:,|\.\.)[^{}]*)\}')
_SPLIT = re.compile('(?:^|[^a-z])(train|valid|val|validation|test)(?![a-z])')
_ENDINGS = {'wds': r'\.(tar(\.\w+)?|tgz)', 'parquet': r'\.parquet'}


class Names(Sequence):
  """An Arrow array of names as text: a million of them are no objects."""

  def __init__(self, array: pa.Array, prefix: str = ''):
    self.array, self._prefix = array, prefix

  def __len__(self):
    return len(self.array)

  def __getitem__(self, index):
    return self._prefix + os.fsdecode(self.array[int(index)].as_py())


class ShardSource(Source):
  """The images of a split in `files`: `shards` int [n], names and labels [n].

  A damaged record is an OSError; a file that is no longer the one that was
  opened is a ValueError, which ends the work.
  """

  def __init__(
    self, split, files, file_stamps, shards, names: pa.Array, labels
  ):
    self.split, self.files, self.file_stamps = split, files, file_stamps
    self.shards, self.keys = shards, Names(names)
    self.labels = np.ascontiguousarray(labels, np.int32)

  def __len__(self):
    return len(self.keys)

  def identity(self):
    """The names, after their split."""
    prefix = '' if self.split == 'all' else f'{self.split}/'
    return Names(self.keys.array, prefix)

  def stamps(self):
    """See `Source`: those of the files."""
    return np.array(self.file_stamps, np.int64)[self.shards]

  @property
  def inodes(self):
    """As of a folder: no image has two names."""
    rows = np.arange(len(self), dtype=np.uint64)
    split = ('all', *SPLITS).index(self.split)
    return np.stack([np.full_like(rows, split), rows], 1)

  def refuse_repeated(self) -> None:
    """Raises ValueError if two images have one name."""
    names = self.keys.array
    if len(names) > pc.count_distinct(names).as_py():
      counts = pc.value_counts(names)
      key = counts.filter(pc.greater(counts.field('counts'), 1))[0]['values']
      same = pc.equal(names, key).to_numpy(zero_copy_only=False)
      a, b, *_ = (printable(self.files[x]) for x in self.shards[same])
      raise ValueError(
        f'{a} and {b} both hold {printable(os.fsdecode(key.as_py()))}: '
        'expected different names'
      )

  def check(self, shard: int, status: os.stat_result) -> None:
    """Raises ValueError unless a file has the size and time that it had."""
    if stamp(status) != self.file_stamps[shard]:
      raise ValueError(
        f'{printable(self.files[shard])} changed while it was read; give the '
        'same command again'
      )


def stamp(status: os.stat_result) -> tuple[int, int]:
  """Size and time of change of a file."""
  return status.st_size, status.st_mtime_ns


def open_shards(kind: str, pattern: str) -> dict[str, Source]:
  """Opens the files of a pattern by split; `kind` is 'wds' or 'parquet'.

  Split names are read in the names of the files, else of the folders below the
  one that all files share; without any, all images are the split 'all'.
  """
  if kind == 'wds':
    from rvq_jax.data.tars import open_tars as open_files
  else:
    from rvq_jax.data.tables import open_parquet as open_files
  files = _divide(pattern, _find(kind, pattern))
  sources = open_files(files)
  counts = [f'{x} {len(y):,}' for x, y in sources.items()]
  logging.info('%s: %s images', printable(pattern), ', '.join(counts))
  return sources


def _find(kind: str, pattern: str) -> list[str]:
  """The absolute paths of the files of a pattern."""
  if re.match('[a-z][a-z0-9+.-]*:', pattern, re.I):
    raise ValueError(
      f'{kind}: expected local files, got {pattern}; download them first'
    )
  path, found = os.path.abspath(os.path.expanduser(pattern)), []
  if os.path.isdir(path):
    fits = re.compile(rf'[^.].*{_ENDINGS[kind]}', re.I).fullmatch
    found = [os.path.join(path, x) for x in os.listdir(path) if fits(x)]
    if not found:
      raise ValueError(f'{printable(path)} holds no files for {kind}:')
  for part in [] if found else _expand(path):
    matches = [part] if os.path.exists(part) else glob.glob(part)
    if not matches:
      raise ValueError(f'{kind}: there is no {printable(part)}')
    found += matches
  return sorted(set(found))


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
  return list(itertools.chain(*(_expand(before + x + after) for x in parts)))


def split_name(name: str) -> str | None:
  """The split that the name of a shard, folder or split tells, or None."""
  match = _SPLIT.search(name.lower())
  split = match and match[1]
  return 'validation' if split in ('val', 'valid') else split


def _divide(pattern: str, files: list[str]) -> dict[str, list[str]]:
  """The files of each split."""
  shared, found = os.path.commonpath([*map(os.path.dirname, files)]), {}
  for file in files:
    folder, name = os.path.split(os.path.relpath(file, shared))
    found.setdefault(split_name(name) or split_name(folder), []).append(file)
  if len(found) > 1 and None in found:
    raise ValueError(
      f'{printable(pattern)}: expected a split in the name of each file or of '
      f'none, got none in {printable(found[None][0])}'
    )
  found = {split or 'all': found[split] for split in found}
  return {split: found[split] for split in ('all', *SPLITS) if split in found}
