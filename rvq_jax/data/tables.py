"""Arrow tables: parquet:PATTERN, and hf:OWNER/NAME or a folder of save_to_disk.

The images are binary, or structs of `bytes` and `path`, as `datasets` writes.
"""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rvq_jax.data.folders import printable
from rvq_jax.data.shards import ShardSource, stamp
from rvq_jax.data.sources import SPLITS, Record, Source

_IMAGES = re.compile('(struct<(.*, )?bytes: )?(large_)?binary')
_CACHE_BYTES = 2**28  # of row groups of Parquet, in each process


class TableSource(ShardSource):
  """The rows of Parquet files, or of Arrow streams; their keys are FILE/ROW."""

  def __init__(self, split: str, files: list[str]):
    self._columns, labels, sizes = zip(*map(_scan, files), strict=True)
    stats = [stamp(os.stat(path)) for path in files]
    groups = [[(i, j) for j in range(len(x))] for i, x in enumerate(sizes)]
    self._groups, sizes = sum(groups, []), np.array(sum(sizes, []))
    self._ends = np.cumsum(sizes[:, 0])
    self._kept = max(1, _CACHE_BYTES // sizes[:, 1].max())
    rows, here = [*map(len, labels)], os.path.dirname(files[0])
    names = [os.path.relpath(x, here).removesuffix('.parquet') for x in files]
    counted = zip(names, rows, strict=True)
    keys = [f'{name}/{i}' for name, count in counted for i in range(count)]
    if files[0].endswith('.arrow'):  # of `datasets`: any number for one table
      keys = [*map(str, range(len(keys)))]
    shards = np.repeat(np.arange(len(files), dtype=np.int32), rows)
    keys, labels = pa.array(keys, pa.large_string()), np.concatenate(labels)
    super().__init__(split, files, stats, shards, keys, labels)

  def __getitem__(self, index):
    group = int(np.searchsorted(self._ends, index, side='right'))
    # From the end of its group.
    value = self._images(group)[int(index - self._ends[group])].as_py()
    name = self.keys[index]
    if isinstance(value, dict):
      value, path = value['bytes'], value.get('path') or name
      name = name if os.path.isabs(path) else path
      if value is None:  # `datasets` may keep the path only
        value = Path(path).read_bytes()
    if value is None:
      raise OSError(f'{printable(name)} has no bytes')
    return Record(value, int(self.labels[index]), printable(name))

  @functools.cached_property
  def _images(self):
    """Group -> its images; the last ones are kept."""
    return functools.lru_cache(int(self._kept))(self._load)

  def _load(self, group: int) -> pa.Array:
    shard, part = self._groups[group]
    path, column = self.files[shard], self._columns[shard]
    self.check(shard, os.stat(path))
    try:
      if path.endswith('.arrow'):
        return _stream(path)[column].chunk(part)
      with pq.ParquetFile(path) as file:
        table = file.read_row_group(part, [column], use_threads=False)
        return table[column].combine_chunks()
    except (pa.ArrowException, OSError) as error:
      raise OSError(_fault(path, error)) from error

  def __getstate__(self):
    return {k: v for k, v in vars(self).items() if k != '_images'}


@functools.lru_cache(4096)
def _stream(path: str) -> pa.Table:
  """An Arrow file of `datasets`, mapped: only what is used is in memory."""
  return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _fault(path: str, error) -> str:
  return f'{printable(path)} is damaged: {str(error).strip().splitlines()[0]}'


def _scan(path: str):
  """Column of the images, labels [n], [(rows, bytes) of each group]."""
  try:
    if path.endswith('.arrow'):
      table = _stream(path)
      column = _image_column(path, table.schema)
      sizes = [(len(chunk), 1) for chunk in table[column].chunks]
    else:
      with pq.ParquetFile(path) as file:
        column, table = (
          _image_column(path, file.schema_arrow),
          file.read(['label']),
        )
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        sizes = [(x.num_rows, x.total_byte_size) for x in groups]
    labels = np.full(sum(rows for rows, _ in sizes), -1, np.int32)
    if 'label' in table.column_names:  # text is no class
      column_ = table['label']
      if pa.types.is_integer(column_.type):
        labels = pc.fill_null(column_.cast(pa.int32()), -1).to_numpy()
  except (pa.ArrowException, OSError) as error:
    raise ValueError(_fault(path, error)) from error
  if not len(labels):
    raise ValueError(f'{printable(path)} holds no images')
  return column, labels, sizes


def _image_column(path: str, schema: pa.Schema) -> str:
  """The column `image`, or the only one that can be of images."""
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
  """Opens the data set OWNER/NAME[/CONFIG][@REVISION], or of save_to_disk.

  `datasets` makes Arrow files of it in the user's cache; these are read here.
  """
  try:
    import datasets

    if int(datasets.__version__.partition('.')[0]) < 4:
      raise ImportError('before 4, it ran scripts of a data set')
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
  names = {'validation': ('validation', 'valid', 'val')}
  files = {
    split: [file['filename'] for file in parts[name].cache_files]
    for split in ('all', *SPLITS)
    for name in names.get(split, (split,))
    if name in parts
  }
  if not files or not all(files.values()):
    raise ValueError(
      f'hf:{name}: expected files of {", ".join(SPLITS)}, got splits '
      f'{", ".join(parts)}'
    )
  return open_tables(files)
