"""Writes a data set as tars of WebDataset and as Parquet, and compares batches.

python examples/shards.py --data=tfds:NAME|folder:PATH --output=DIR
  [--data_dir=DIR] [--shards=8] [--batches=20]

Train on them with --config.data.name=wds:DIR/wds or parquet:DIR/parquet. It
compares training batches, whole and cropped.
"""

import argparse
import contextlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rvq_jax.data.datasets import open_images
from rvq_jax.data.loaders import make_train_loader
from rvq_jax.data.sources import Record


def write_tar(path, records: Iterable[tuple[str, Record]]) -> None:
  """Writes images as KEY.jpg (or .png) and their classes as KEY.cls."""
  with tarfile.open(path, 'w') as archive:
    for key, record in records:
      end = 'png' if record.image[1:4] == b'PNG' else 'jpg'
      parts = {end: record.image, 'cls': b'%d' % record.label}
      for name, data in parts.items():
        member = tarfile.TarInfo(f'{key}.{name}')
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def write_parquet(path, records: Iterable[tuple[str, Record]]) -> None:
  """Writes columns image (bytes, path) and label, as `datasets` does."""
  rows = [
    {'image': {'bytes': x.image, 'path': None}, 'label': x.label}
    for _, x in records
  ]
  options = {'compression': 'none', 'use_dictionary': False}
  table = pa.Table.from_pylist(rows)
  pq.write_table(table, path, row_group_size=100, **options)


WRITERS = {'wds': (write_tar, 'tar'), 'parquet': (write_parquet, 'parquet')}


def write(sources, folder: Path, kind: str, shards: int) -> str:
  """Writes the splits as FOLDER/SPLIT-NUMBER.END; returns KIND:FOLDER."""
  writer, end = WRITERS[kind]
  folder.mkdir(parents=True)
  for split, source in sources.items():
    parts = np.array_split(np.arange(len(source)), shards)
    for number, rows in enumerate(map(np.ndarray.tolist, parts)):
      records = ((f'{i:08d}', source[i]) for i in rows)
      writer(folder / f'{split}-{number:05d}.{end}', records)
  return f'{kind}:{folder}'


def compare(sources, others, batches: int) -> None:
  """Compares labels and training batches; AssertionError if they differ."""
  for split, source in sources.items():
    np.testing.assert_array_equal(source.labels, others[split].labels)
    for crop in ('none', 'random_resized'):
      options = {'batch_size': min(32, len(source)), 'image_size': 32}
      options |= {'in_memory': False, 'crop': crop, 'seed': 1}
      with contextlib.ExitStack() as stack:
        pair = [
          make_train_loader(x, **options) for x in (source, others[split])
        ]
        for loader in pair:
          stack.callback(loader.close)
        for _ in range(batches):
          one, two = (next(loader)['image'] for loader in pair)
          np.testing.assert_array_equal(one, two)


def main() -> None:
  """Writes and compares."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True)
  parser.add_argument('--output', type=Path, required=True)
  parser.add_argument('--data_dir')
  parser.add_argument('--shards', type=int, default=8)
  parser.add_argument('--batches', type=int, default=20)
  options = parser.parse_args()
  sources = open_images(options.data, data_dir=options.data_dir)
  for kind in WRITERS:
    name = write(sources, options.output / kind, kind, options.shards)
    compare(sources, open_images(name), options.batches)
    counts = ', '.join(f'{x} {len(sources[x]):,}' for x in sources)
    print(f'{name}: {counts} images, equal batches')


if __name__ == '__main__':
  main()
