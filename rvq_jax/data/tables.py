"""Arrow tables: parquet:PATTERN, and hf:OWNER/NAME or a folder of save_to_disk.

The images are binary, or structs of `bytes` and `path`, as `datasets` writes.
"""

import functools
import mmap
import os
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rvq_jax.data.folders import printable
from rvq_jax.data.shards import ShardSource, stamp
from rvq_jax.data.sources import SPLITS, Record, Source

_IMAGES = re.compile('(struct<(.*, )?bytes: )?(large_)?binary')
_OTHER_NAMES = {'val': 'validation', 'valid': 'validation'}
_CACHE_BYTES = 2**28  # row groups per process
_ONE_AT_A_TIME = threading.Lock()


class TableSource(ShardSource):
  """The rows of Parquet files, or of Arrow streams; their keys are FILE/ROW.

  It reads whole row groups. If they are uncompressed, as `datasets` writes
  images, it keeps the place of each image, else the last groups.
  """

  def __init__(self, split: str, files: list[str]):
    stats = [stamp(os.stat(path)) for path in files]
    self._columns, labels, sizes = zip(*map(_scan, files), strict=True)
    groups = [[(i, j) for j in range(len(x))] for i, x in enumerate(sizes)]
    self._groups, sizes = sum(groups, []), np.array(sum(sizes, []))
    self._ends = np.cumsum(sizes[:, 0])
    self._kept = int(max(1, _CACHE_BYTES // sizes[:, 1].max()))
    rows = [*map(len, labels)]
    stems = [os.path.relpath(x, os.path.dirname(files[0])) for x in files]
    stems = [f'{os.path.splitext(x)[0]}/' for x in stems]
    if files[0].endswith('.arrow'):  # `datasets` cuts a table anywhere
      stems, rows = [''], [sum(rows)]
    names = zip(stems, rows, strict=True)
    keys = [f'{stem}{i}' for stem, count in names for i in range(count)]
    shards = np.repeat(np.arange(len(files)), [*map(len, labels)])
    keys, labels = pa.array(keys, pa.large_string()), np.concatenate(labels)
    super().__init__(split, files, stats, shards, keys, labels)

  def __getitem__(self, index):
    group = int(np.searchsorted(self._ends, index, side='right'))
    with _ONE_AT_A_TIME:
      images = self._images(group)
    # From the end of the group.
    value = images[int(index - self._ends[group])]
    if isinstance(images, np.ndarray):
      value = self.read(self.shards[index], *value.tolist())
    elif isinstance(value := value.as_py(), dict):
      value, path = value['bytes'], value.get('path') or ''
      if value is None and os.path.isabs(path):  # as `datasets` may keep it
        value = Path(path).read_bytes()
    name = printable(self.keys[index])
    return Record(value or b'', int(self.labels[index]), name)

  @functools.cached_property
  def _images(self):
    return functools.lru_cache(self._kept)(self._load)

  def _load(self, group: int):
    """The images of a group, or their sizes and places, int [n, 2]."""
    shard, part = self._groups[group]
    path, column = self.files[shard], self._columns[shard]
    self.read(shard, 0, 0)  # checks the file
    try:
      if path.endswith('.arrow'):
        return _stream(path)[column].chunk(part)
      with pq.ParquetFile(path) as file:
        images = file.read_row_group(part, [column], use_threads=False)
        chunk = _plain(file.metadata.row_group(part), column)
      images = images[column].combine_chunks()
    except (pa.ArrowException, OSError) as error:
      raise OSError(_fault(path, error)) from error
    places = chunk and _places(path, chunk, images)
    return images if places is None else places

  def __getstate__(self):
    return {k: v for k, v in vars(self).items() if k != '_images'}


@functools.lru_cache(4096)
def _stream(path: str) -> pa.Table:
  """An Arrow file of `datasets`, mapped: memory holds only the used part."""
  return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _fault(path: str, error) -> str:
  return f'{printable(path)} is damaged: {str(error).strip().splitlines()[0]}'


def _plain(group, column: str):
  """The chunk of a row group's images if uncompressed, or None."""
  chunks = map(group.column, range(group.num_columns))
  names = column, f'{column}.bytes'
  chunk = next(x for x in chunks if x.path_in_schema in names)
  return chunk if chunk.compression == 'UNCOMPRESSED' else None


def _places(path: str, chunk, images: pa.Array) -> np.ndarray | None:
  """Size and place of each image in a file; None if it does not hold one."""
  if pa.types.is_struct(images.type):
    images = pc.struct_field(images, 'bytes')
  places = np.zeros((len(images), 2), np.int64)
  at = chunk.dictionary_page_offset or chunk.data_page_offset
  end = at + chunk.total_compressed_size
  with open(path, 'rb') as file:
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  for i in np.flatnonzero(images.is_valid()):
    image = images[int(i)].as_py()
    at = whole.find(image, at, end)
    if at < 0:
      return None
    places[i] = len(image), at
    at += len(image)
  return places


def _scan(path: str):
  """Column of the images, labels [n], and rows and kept bytes per group."""
  sizes = []
  try:
    if path.endswith('.arrow'):
      table = _stream(path)
      column = _image_column(path, table.schema)
      sizes = [(len(chunk), 1) for chunk in table[column].chunks]
    else:
      with pq.ParquetFile(path) as file:
        column = _image_column(path, file.schema_arrow)
        table, groups = file.read(['label']), range(file.num_row_groups)
        for x in map(file.metadata.row_group, groups):
          kept = 16 * x.num_rows if _plain(x, column) else x.total_byte_size
          sizes.append((x.num_rows, kept))
    labels = np.full(sum(rows for rows, _ in sizes), -1, np.int32)
    known = 'label' in table.column_names and table['label']
    if known and pa.types.is_integer(known.type):  # text is no class
      labels = pc.fill_null(known.cast(pa.int32()), -1).to_numpy()
  except (pa.ArrowException, OSError) as error:
    raise ValueError(_fault(path, error)) from error
  if not len(labels):
    raise ValueError(f'{printable(path)} holds no images')
  return column, labels, sizes


def _image_column(path: str, schema: pa.Schema) -> str:
  """The column `image`, or the only one that can hold images."""
  found = [x.name for x in schema if _IMAGES.match(str(x.type))]
  if 'image' not in found and len(found) != 1:
    raise ValueError(
      f'{printable(path)}: expected one column of bytes or of structs with '
      f'bytes, or such a column image, got {", ".join(schema.names)}'
    )
  return 'image' if 'image' in found else found[0]


def open_tables(files: dict[str, list[str]]) -> dict[str, Source]:
  """Opens the Parquet or Arrow files of each split."""
  return {split: TableSource(split, files[split]) for split in files}


def open_hub(name: str) -> dict[str, Source]:
  """Opens OWNER/NAME[/CONFIG][@REVISION], or a folder of save_to_disk.

  `datasets` converts it to Arrow files in the user's cache, which this reads.
  """
  try:
    import datasets

    if int(datasets.__version__.partition('.')[0]) < 4:
      raise ImportError('older versions run scripts of a data set')
    if os.path.isdir(path := os.path.expanduser(name)):
      parts = datasets.load_from_disk(path)
    else:
      place, _, revision = name.partition('@')
      owner, *config = place.split('/', 2)
      where = '/'.join([owner, *config[:1]]), *config[1:]
      parts = datasets.load_dataset(*where, revision=revision or None)
  except ImportError as error:
    raise ImportError(
      f"hf:{name} needs the extra hf: pip install 'datasets>=4' ({error})"
    ) from error
  except Exception as error:  # also from its HTTP library
    reason = str(error).strip().partition('\n')[0]
    raise OSError(f'cannot open hf:{name}: {reason}') from error
  parts = parts if hasattr(parts, 'keys') else {'all': parts}
  parts = {_OTHER_NAMES.get(x, x): parts[x] for x in parts}
  files = {x: parts[x].cache_files for x in ('all', *SPLITS) if x in parts}
  if not files or not all(files.values()):
    raise ValueError(
      f'hf:{name}: expected files for {", ".join(SPLITS)}, got the splits '
      f'{", ".join(parts)}'
    )
  files = {x: [file['filename'] for file in files[x]] for x in files}
  return open_tables(files)
