"""Tars of WebDataset: indexed once, then read at random by their offsets."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from rvq_jax.data.decoding import map_ahead
from rvq_jax.data.folders import printable
from rvq_jax.data.shards import ShardSource, stamp
from rvq_jax.data.sources import Record, Source
from rvq_jax.data.transforms import extensions
from rvq_jax.io import write_atomic

_MARK = b'rvq_jax tars 1'  # of an index, in whose metadata are the tars' stamps
_SCHEMA = pa.schema(
  [('shard', pa.int32()), ('offset', pa.int64()), ('size', pa.int64())]
  + [('label', pa.int32()), ('key', pa.large_binary())]
)
_THREADS, _OPEN_FILES, _MAX_TEXT = 16, 256, 2**20
_PACKED = {b'\x1f\x8b': 'gzip -d', b'\x28\xb5\x2f\xfd': 'zstd -d --rm'}
_PACKED |= {b'\xfd7zXZ': 'xz -d', b'BZh': 'bzip2 -d'}


class TarSource(ShardSource):
  """The images of a split; `rows` of an index, of all `files` by split."""

  def __init__(self, files: dict[str, list[str]], split, stamps, rows):
    self._by_split, paths = files, sum(files.values(), [])
    columns = [column.combine_chunks() for column in rows.columns]
    numbers = [column.to_numpy() for column in columns[:-1]]
    shards, self._offsets, self._sizes, labels = numbers
    super().__init__(split, paths, stamps, shards, columns[-1], labels)

  def __getitem__(self, index):
    shard = int(self.shards[index])
    file = _opened(self.files[shard], self.file_stamps[shard])
    self.check(shard, os.fstat(file.descriptor))
    place = int(self._sizes[index]), int(self._offsets[index])
    data = os.pread(file.descriptor, *place)
    return Record(data, int(self.labels[index]), printable(self.keys[index]))

  def __reduce__(self):
    return _again, (self._by_split, self.split, self.file_stamps)


def _again(files, split, stamps) -> TarSource:
  """The source in another process, which maps the same index."""
  source = open_tars(files)[split]
  for shard, path in enumerate(source.files):
    source.file_stamps = stamps
    source.check(shard, os.stat(path))
  return source


class _File:
  """An open file, until nobody reads it any more."""

  descriptor = None

  def __init__(self, path):
    self.descriptor = os.open(path, os.O_RDONLY)

  def __del__(self):
    if self.descriptor is not None:
      os.close(self.descriptor)


@functools.lru_cache(_OPEN_FILES)  # of each process
def _opened(path: str, stamp) -> _File:
  return _File(path)


def open_tars(files: dict[str, list[str]]) -> dict[str, Source]:
  """Opens the tars of each split; indexes them, unless an index is there.

  It is kept in the user's cache, and beside the first tar if that is possible.
  """
  paths = sum(files.values(), [])
  stamps, here = [stamp(os.stat(path)) for path in paths], Path(paths[0]).parent
  names = [os.path.relpath(path, here) for path in paths]
  head = json.dumps([names, stamps]).encode()
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  cache = Path(home, 'rvq_jax', 'tars', _digest([here.as_posix(), *names]))
  places = [cache, here / f'.rvq_jax-tars-{_digest(names)}']
  for place in places:
    if index := _read(place, head):
      return _sources(files, stamps, index)
  index = _build(paths).replace_schema_metadata({_MARK: head})
  sources = _sources(files, stamps, index)
  for source in sources.values():
    source.refuse_repeated()
  content = pa.BufferOutputStream()
  with pa.ipc.new_file(content, index.schema) as stream:
    stream.write_table(index)
  for place in places:
    _keep(place, content.getvalue().to_pybytes())
  return sources


def _sources(files, stamps, index: pa.Table) -> dict[str, Source]:
  ends = np.cumsum([0, *map(len, files.values())])
  rows = np.searchsorted(index['shard'].to_numpy(), ends).tolist()
  return {
    split: TarSource(files, split, stamps, index.slice(start, stop - start))
    for split, start, stop in zip(files, rows, rows[1:], strict=False)
  }


def _digest(names: list[str]) -> str:
  return hashlib.sha256(os.fsencode('\0'.join(names))).hexdigest()[:16]


def _read(place: Path, head: bytes) -> pa.Table | None:
  """The index of such tars in a file, mapped: processes share its memory."""
  with contextlib.suppress(OSError, ValueError):  # also of Arrow
    index = pa.ipc.open_file(pa.memory_map(str(place))).read_all()
    index.validate(full=True)
    kept = (index.schema.metadata or {}).get(_MARK)
    if kept == head and index.schema.equals(_SCHEMA):
      return index
  return None


def _keep(place: Path, content: bytes) -> None:
  """Writes an index, if nothing or an Arrow file is there."""
  try:
    is_free = not place.exists() or place.read_bytes()[:6] == content[:6]
    if place.is_absolute() and is_free:
      place.parent.mkdir(parents=True, exist_ok=True)
      write_atomic(place, content)
  except OSError as error:
    logging.info('cannot keep the index of the tars: %s', error)


def _build(paths: list[str]) -> pa.Table:
  """Indexes tars in threads."""
  logging.info('indexing %d tars, once', len(paths))
  parts, lacking = [], 0
  for shard, found in enumerate(
    map_ahead(_examples, paths, 2 * _THREADS, _THREADS)
  ):
    rows = [(x[1:], key) for key, x in found.items() if x[0]]
    lacking += len(found) - len(rows)
    if not rows:
      raise ValueError(
        f'{printable(paths[shard])} holds no images; expected members such as '
        '0001.jpg and 0001.cls'
      )
    columns = zip(*((shard, *place, key) for place, key in rows), strict=True)
    parts.append(pa.table([*map(list, columns)], _SCHEMA))
  if lacking:
    logging.info('left out %d examples that have no image', lacking)
  return pa.concat_tables(parts).combine_chunks()


def _examples(path: str) -> dict[bytes, list]:
  """The examples of a tar: key -> [ending, offset, size, label].

  By WebDataset's rule, members with one name up to its first dot are one.
  """
  images, found = {end[1:] for end in extensions()}, {}
  with open(path, 'rb') as stream:
    for member in _members(path, stream):
      folder, name = os.path.split(member.name.removeprefix('./'))
      stem, _, ending = name.partition('.')
      ending = ending.lower()
      example = found.setdefault(
        os.fsencode(os.path.join(folder, stem)), ['', 0, 0, -1]
      )
      if ending in images:
        if example[0]:
          raise ValueError(
            f'{printable(path)} has two images of one example: '
            f'{printable(member.name)} and .{printable(example[0])}'
          )
        example[:3] = ending, member.offset_data, member.size
      elif ending in ('cls', 'json') and member.size <= _MAX_TEXT:
        stream.seek(member.offset_data)
        example[3] = _label(stream.read(member.size), ending, example[3])
  return found


def _label(text: bytes, ending: str, default: int) -> int:
  """The class in a member .cls or .json; text is no class."""
  with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
    label = int(text) if ending == 'cls' else json.loads(text)['label']
    if type(label) is int and -(2**31) <= label < 2**31:
      return label
  return default


def _members(path: str, stream):
  """Yields the regular files that have a stem and an ending."""
  shown, quoted = printable(path), shlex.quote(path)
  begin = stream.read(6)
  for packed, tool in _PACKED.items():
    if begin.startswith(packed):
      raise ValueError(f'{shown} is compressed; unpack it: {tool} {quoted}')
  stream.seek(0)
  try:
    tar = tarfile.TarFile(fileobj=stream)
    while (member := tar.next()) is not None:
      tar.members.clear()
      stem, dot, _ = os.path.basename(member.name).partition('.')
      if member.issparse():
        raise ValueError(
          f'{shown} has a sparse file, {printable(member.name)}; unpack it: '
          f'tar -xf {quoted}, and pack it anew'
        )
      if member.isreg() and stem and dot:
        yield member
    stream.seek(tar.offset)
    if (rest := stream.read(_MAX_TEXT)) and not any(rest):
      return
    reason = 'no end' if not rest else 'data after its end'
  except (tarfile.TarError, OSError) as error:
    reason = str(error)
  raise ValueError(
    f'{shown} is cut short or damaged ({reason}); put back a whole copy'
  )
