"""Arrow tables: parquet:PATTERN, and hf:OWNER/NAME or a folder of save_to_disk.

The images are binary, or structs of `bytes` and `path`, as `datasets` writes.
"""

import functools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rvq_jax.data.folders import printable
from rvq_jax.data.shards import ShardSource, stamp
from rvq_jax.data.sources import SPLITS, Record, Source
from rvq_jax.io import read_json

_CACHE_BYTES = 2**28  # of row groups of Parquet, in each process
_INFO, _STATE = 'dataset_dict.json', 'state.json'


class TableSource(ShardSource):
  """The rows of Parquet files, or of Arrow streams, which are mapped."""

  def __init__(self, split: str, files: list[str]):
    stats = [stamp(os.stat(path)) for path in files]
    scans = [_scan(path) for path in files]
    self._columns = [column for column, *_ in scans]
    sizes = [size for *_, sizes in scans for size in sizes]
    self._ends = np.cumsum([rows for rows, _ in sizes])
    self._groups = [
      (shard, group)
      for shard, (*_, sizes) in enumerate(scans)
      for group in range(len(sizes))
    ]
    self._kept = max(1, _CACHE_BYTES // max(size for _, size in sizes))
    rows = [len(labels) for _, labels, *_ in scans]
    names = _names(files, [paths for _, _, paths, _ in scans], rows)
    labels = np.concatenate([labels for _, labels, *_ in scans])
    shards = np.repeat(np.arange(len(files), dtype=np.int32), rows)
    super().__init__(split, files, stats, shards, names, labels)

  def __getitem__(self, index):
    group = int(np.searchsorted(self._ends, index, side='right'))
    shard, name = self.shards[index], printable(self.keys[index])
    # From the end of its group.
    value = self._images(group)[int(index - self._ends[group])].as_py()
    if isinstance(value, dict):
      value, path = value['bytes'], value.get('path')
      if value is None and path and not _is_parquet(self.files[shard]):
        value = Path(path).read_bytes()  # as `datasets` lists folders
    if value is None:
      raise OSError(f'{name} has no bytes')
    return Record(value, int(self.labels[index]), name)

  @functools.cached_property
  def _images(self):
    """Group -> its images; the last ones are kept."""
    return functools.lru_cache(self._kept)(self._load)

  def _load(self, group: int) -> pa.Array:
    shard, part = self._groups[group]
    path, column = self.files[shard], self._columns[shard]
    self.check(shard, os.stat(path))
    try:
      if not _is_parquet(path):
        return _stream(path)[column].chunk(part)
      with pq.ParquetFile(path) as file:
        table = file.read_row_group(part, [column], use_threads=False)
      return table[column].combine_chunks()
    except (pa.ArrowException, OSError) as error:
      raise OSError(f'{printable(path)}: {_first_line(error)}') from error

  def __getstate__(self):
    return {k: v for k, v in vars(self).items() if k != '_images'}


def _is_parquet(path: str) -> bool:
  return path.lower().endswith('.parquet')


@functools.lru_cache(4096)
def _stream(path: str) -> pa.Table:
  """An Arrow file of `datasets`, of which only what is used is in memory."""
  return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _first_line(error) -> str:
  return str(error).strip().partition('\n')[0]


def _scan(path: str):
  """Column of the images, labels, paths or None, [(rows, bytes) of a group]."""
  try:
    if _is_parquet(path):
      file = pq.ParquetFile(path)
      column = _image_column(path, file.schema_arrow)
      table = file.read([f'{column}.path', 'label'])
      groups = map(file.metadata.row_group, range(file.num_row_groups))
      sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    else:
      table = _stream(path)
      column = _image_column(path, table.schema)
      sizes = [(len(chunk), 1) for chunk in table[column].chunks]
  except (pa.ArrowException, OSError) as error:
    raise ValueError(
      f'{printable(path)} is damaged or no table: {_first_line(error)}'
    ) from error
  rows = sum(count for count, _ in sizes)
  if not rows:
    raise ValueError(f'{printable(path)} holds no images')
  labels, paths = np.full(rows, -1, np.int32), None
  names = table.column_names
  if 'label' in names and pa.types.is_integer(table['label'].type):
    labels = pc.fill_null(table['label'], -1).cast(pa.int32()).to_numpy()
  if column in names and pa.types.is_struct(table[column].type):
    if table[column].type.get_field_index('path') >= 0:
      paths = pc.struct_field(table[column], 'path').cast(pa.large_string())
  return column, labels, paths, sizes


def _image_column(path: str, schema: pa.Schema) -> str:
  """The column `image`, or the only one that can be of images."""

  def fits(kind):
    if pa.types.is_struct(kind) and (i := kind.get_field_index('bytes')) >= 0:
      kind = kind.field(i).type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

  found = [field.name for field in schema if fits(field.type)]
  if 'image' not in found and len(found) != 1:
    raise ValueError(
      f'{printable(path)}: expected a column image, binary or a struct with '
      f'bytes, or one such column, got {", ".join(schema.names)}'
    )
  return 'image' if 'image' in found else found[0]


def _names(files, paths, rows) -> pa.Array:
  """The paths in the rows, if they tell them apart, else FILE/ROW."""
  if all(x is not None and not x.null_count for x in paths):
    names = pa.chunked_array([c for x in paths for c in x.chunks])
    names = names.combine_chunks()
    absolute = pc.any(pc.starts_with(names, '/')).as_py()
    if pc.count_distinct(names).as_py() == len(names) and not absolute:
      return names
  stems = [Path(file).stem for file in files]
  numbered = zip(stems, rows, strict=True)
  return pa.array(
    [f'{stem}/{i}' for stem, count in numbered for i in range(count)],
    pa.large_string(),
  )


def open_parquet(files: dict[str, list[str]]) -> dict[str, Source]:
  """Opens the Parquet or Arrow files of each split."""
  sources = {split: TableSource(split, paths) for split, paths in files.items()}
  for source in sources.values():
    source.refuse_repeated()
  return sources


def open_hub(name: str) -> dict[str, Source]:
  """Opens a data set of the Hub, OWNER/NAME[/CONFIG], or of save_to_disk."""
  path = Path(name).expanduser().absolute()
  files = _on_disk(path) if path.is_dir() else _download(name)
  names = {
    {'val': 'validation', 'valid': 'validation'}.get(x, x): x for x in files
  }
  found = {x: files[names[x]] for x in ('all', *SPLITS) if x in names}
  if not all(found.values()) or not found:
    raise ValueError(
      f'hf:{name}: expected one of the splits {", ".join(SPLITS)}, got '
      f'{", ".join(files) or "none"}'
    )
  return open_parquet(found)


def _on_disk(path: Path) -> dict[str, list[str]]:
  """The Arrow files of each split of a folder of save_to_disk."""
  try:
    folders = {'all': path}
    if (path / _INFO).exists():
      folders = {x: path / x for x in (read_json(path / _INFO) or {})['splits']}
    states = {x: read_json(folders[x] / _STATE) or {} for x in folders}
    return {
      x: [str(folders[x] / y['filename']) for y in states[x]['_data_files']]
      for x in folders
    }
  except (OSError, KeyError, TypeError) as error:
    raise ValueError(
      f'{printable(str(path))} is no folder of save_to_disk: {error}'
    ) from error


def _download(name: str) -> dict[str, list[str]]:
  """The Arrow files of each split of a data set, in the user's cache."""
  place, _, revision = name.partition('@')
  owner, *rest = place.split('/')
  try:
    import datasets

    if int(datasets.__version__.partition('.')[0]) < 4:
      raise ImportError('earlier versions run the scripts of a data set')
    loaded = datasets.load_dataset(
      '/'.join([owner, *rest[:1]]), *rest[1:], revision=revision or None
    )
  except ImportError as error:
    raise ImportError(
      f"hf:{name} needs the extra hf: pip install 'datasets>=4' ({error})"
    ) from error
  except Exception as error:  # also from its HTTP library
    raise OSError(f'cannot fetch hf:{name}: {_first_line(error)}') from error
  return {
    split: [file['filename'] for file in part.cache_files]
    for split, part in loaded.items()
  }
