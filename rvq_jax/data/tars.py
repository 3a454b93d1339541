"""WebDataset tars: indexed once, then read at random by offset."""

import contextlib
import hashlib
import json
import logging
import os
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rvq_jax.data.decoding import map_ahead
from rvq_jax.data.folders import printable
from rvq_jax.data.shards import ShardSource, stamp
from rvq_jax.data.sources import Record, Source
from rvq_jax.data.transforms import extensions
from rvq_jax.io import cache_folder, write_atomic

_MARK = b'rvq_jax tars 1'  # key in an index; its value identifies the tars
_SCHEMA = pa.schema(
  [('shard', pa.int32()), ('offset', pa.int64()), ('size', pa.int64())]
  + [('label', pa.int32()), ('key', pa.large_binary())]
)
_THREADS, _MAX_TEXT = 16, 2**20
_PACKED = {b'\x1f\x8b': 'gzip -d', b'\x28\xb5\x2f\xfd': 'zstd -d --rm'}
_PACKED |= {b'\xfd7zXZ': 'xz -d', b'BZh': 'bzip2 -d'}


class TarSource(ShardSource):
  """The images of a split: `rows` of an index of all `files`, by split."""

  def __init__(self, files: dict[str, list[str]], split, stamps, rows):
    self._by_split, paths = files, sum(files.values(), [])
    *numbers, keys = [column.chunk(0) for column in rows.columns]
    shards, self._offsets, self._sizes, labels = (x.to_numpy() for x in numbers)
    super().__init__(split, paths, stamps, shards, keys, labels)

  def __getitem__(self, index):
    place = self.shards[index], self._sizes[index], self._offsets[index]
    data = self.read(*map(int, place))
    return Record(data, int(self.labels[index]), printable(self.keys[index]))

  def __reduce__(self):
    return _again, (self._by_split, self.split, self.file_stamps)


def _again(files, split, stamps) -> TarSource:
  """The source in a worker, mapping the same index."""
  source = open_tars(files)[split]
  if source.file_stamps != stamps:
    raise ValueError('the tars changed in use; start the same command again')
  return source


def open_tars(files: dict[str, list[str]]) -> dict[str, Source]:
  """Opens the tars of each split; indexes them, unless an index exists.

  The user's cache keeps the index, and so does the first tar's folder if it
  is writable.
  """
  paths = sum(files.values(), [])
  stamps, here = [stamp(os.stat(path)) for path in paths], Path(paths[0]).parent
  names = [os.path.relpath(path, here) for path in paths]
  head = json.dumps([names, stamps]).encode()
  place = cache_folder('tars') / _digest(str(here), *names)
  places = [place, here / f'.rvq_jax-tars-{_digest(*names)}']
  kept = next((x for x in (_read(y, head) for y in places) if x), None)
  index = kept or _build(paths).replace_schema_metadata({_MARK: head})
  ends = np.cumsum([0, *map(len, files.values())])
  rows = np.searchsorted(index['shard'].to_numpy(), ends).tolist()
  sources = {
    split: TarSource(files, split, stamps, index.slice(start, stop - start))
    for split, start, stop in zip(files, rows, rows[1:], strict=False)
  }
  if not kept:
    for source in sources.values():
      _refuse_repeated(source)
    _keep(index, places)
  return sources


def _digest(*names: str) -> str:
  return hashlib.sha256(os.fsencode('\0'.join(names))).hexdigest()[:16]


def _read(place: Path, head: bytes) -> pa.Table | None:
  """The index of these tars in a file, mapped: processes share its memory."""
  with contextlib.suppress(OSError, ValueError):  # also of Arrow
    index = pa.ipc.open_file(pa.memory_map(str(place))).read_all()
    index.validate(full=True)
    if index.schema.equals(_SCHEMA.with_metadata({_MARK: head}), True):
      return index
  return None


def _keep(index: pa.Table, places: list[Path]) -> None:
  """Writes an index, unless the place holds a file that is not Arrow's."""
  content = pa.BufferOutputStream()
  with pa.ipc.new_file(content, index.schema) as stream:
    stream.write_table(index)
  content = content.getvalue().to_pybytes()
  for place in places:
    try:
      is_free = not place.exists() or place.read_bytes()[:6] == content[:6]
      if place.is_absolute() and is_free:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, content)
    except OSError as error:
      logging.info('cannot save the index of the tars: %s', error)


def _refuse_repeated(source: TarSource) -> None:
  counts = pc.value_counts(source.keys.array)
  twice = counts.filter(pc.greater(counts.field('counts'), 1)).field('values')
  if len(twice):
    rows = pc.equal(source.keys.array, twice[0]).to_numpy(zero_copy_only=False)
    a, b, *_ = (printable(source.files[x]) for x in source.shards[rows])
    key = printable(os.fsdecode(twice[0].as_py()))
    raise ValueError(f'{a} and {b} both hold {key}: expected different names')


def _build(paths: list[str]) -> pa.Table:
  """Indexes tars in threads, since a slow disk serves several at once."""
  logging.info('indexing %d tars, once', len(paths))
  tables, left_out = [], 0
  parts = map_ahead(_examples, paths, 2 * _THREADS, _THREADS)
  for shard, found in enumerate(parts):
    rows = [(shard, *x[1:], key) for key, x in found.items() if x[0]]
    if not rows:
      raise ValueError(
        f'{printable(paths[shard])} holds no images; expected members such as '
        '0001.jpg and 0001.cls'
      )
    tables.append(pa.table([*map(list, zip(*rows, strict=True))], _SCHEMA))
    left_out += len(found) - len(rows)
  if left_out:
    logging.info('skipped %d examples without an image', left_out)
  return pa.concat_tables(tables).combine_chunks()


def _examples(path: str) -> dict[bytes, list]:
  """The examples of a tar: key -> [ending, offset, size, label] of the image.

  By WebDataset's rule, members of equal names up to the first dot are one.
  """
  images, found, shown = {x[1:] for x in extensions()}, {}, printable(path)
  with open(path, 'rb') as stream:
    for member in _members(shown, path, stream):
      folder, name = os.path.split(member.name.removeprefix('./'))
      stem, dot, ending = name.lower().partition('.')
      if not (member.isreg() and stem and dot):
        continue
      key = os.fsencode(os.path.join(folder, name[: len(stem)]))
      example = found.setdefault(key, ['', 0, 0, -1])
      if ending in images and example[0]:
        names = f'{printable(member.name)} and .{printable(example[0])}'
        raise ValueError(f'{shown} has two images of one example: {names}')
      if ending in images:
        example[:3] = ending, member.offset_data, member.size
      elif ending in ('cls', 'json') and member.size <= _MAX_TEXT:
        stream.seek(member.offset_data)
        text = stream.read(member.size)
        # Text is not a class.
        with contextlib.suppress(ValueError, LookupError, TypeError):
          label = int(text) if ending == 'cls' else json.loads(text)['label']
          if type(label) is int and -(2**31) <= label < 2**31:
            example[3] = label
  return found


class _Member(tarfile.TarInfo):
  """A member without owner and mode, which would double the time."""

  @classmethod
  def frombuf(cls, buf, encoding, errors):
    """Reads a header."""
    with contextlib.suppress(ValueError, IndexError):
      plain = buf[156] in b'0x' and buf[124] < 128 and not buf[345]
      checksum = sum(buf) - sum(buf[148:156]) + 8 * ord(' ')
      if plain and int(buf[148:156].strip(b'\0 '), 8) == checksum:
        member = cls(buf[:100].partition(b'\0')[0].decode(encoding, errors))
        member.size = int(buf[124:136].strip(b'\0 '), 8)
        member.type = buf[156:157]
        return member
    return super().frombuf(buf, encoding, errors)


def _members(shown: str, path: str, stream):
  """Yields the members of a whole, plain tar."""
  begin, quoted = stream.read(6), shlex.quote(path)
  for packed, tool in _PACKED.items():
    if begin.startswith(packed):
      raise ValueError(f'{shown} is compressed; unpack it: {tool} {quoted}')
  stream.seek(0)
  try:
    tar = tarfile.TarFile(fileobj=stream, tarinfo=_Member)
    while (member := tar.next()) is not None:
      tar.members.clear()
      if member.issparse():
        raise ValueError(
          f'{shown} has a sparse file, {printable(member.name)}; unpack it: '
          f'tar -xf {quoted}, and pack it again without --sparse'
        )
      yield member
    stream.seek(tar.offset)
    rest = stream.read(_MAX_TEXT)
    reason = 'data after its end' if any(rest) else 'no end'
  except (tarfile.TarError, OSError) as error:
    rest, reason = b'', str(error)
  if not rest or any(rest):
    raise ValueError(
      f'{shown} is cut short or damaged ({reason}); restore a whole copy'
    )
