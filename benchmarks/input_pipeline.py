"""How fast each input route is, beside pure decoding on all cores.

python benchmarks/input_pipeline.py [--data=tfds:imagenet2012 --data_dir=DIR]
  [--workers=1,2,4] [--batches=16] [--repeats=5] [--formats [--copies=1]]
  [--index=1000000]

Without --data it prepares 1,024 JPEG crops of scikit-image's photographs of
ImageNet's mean size (about 500 x 375, 110 kB) as an ArrayRecord data set.

  decoders  one process per core: `LoadImage` of a record, nothing else
  threads   batches of `GrainLoader` with num_workers=0
  workers   the same with that many worker processes
  memory    batches of `MemoryLoader` (decoded once, no random crops)

--formats: the images as a folder, tars, Parquet files without compression and
with snappy, `copies` times each, by the first of --workers; ratios to a folder.

--index: that many members in 100 tars as WebDataset writes them, image and
class: how long the index takes, and to open it again.

The routes take turns; printed are the medians of the rates and of their ratios
to the decoders.
"""

import io
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data import datasets, loaders, prepare
from rvq_jax.data.decoding import LoadImage
from rvq_jax.data.sources import Source
from rvq_jax.data.splits import seeded_rng
from rvq_jax.data.transforms import random_resized_crop

_PHOTOGRAPHS = ('astronaut', 'coffee', 'rocket', 'chelsea')
_COUNT = 1024
_SIZES = ((500, 375), (375, 500), (500, 333), (640, 480), (400, 300))
_CROP, _SCALE = 'random_resized', (0.4, 1.0)


def jpegs(data_dir: str) -> Source:
  """Prepares the crops; returns the training split."""
  photographs = [getattr(skimage.data, name)() for name in _PHOTOGRAPHS]

  def read(i: int) -> dict[str, object]:
    rng = seeded_rng(0, i)
    width, height = _SIZES[i % len(_SIZES)]
    crop = random_resized_crop(
      photographs[i % len(photographs)], 640, rng, scale=(0.5, 1.0)
    )
    buffer = io.BytesIO()
    Image.fromarray(crop).resize((width, height)).save(
      buffer, 'JPEG', quality=95
    )
    return {'image': buffer.getvalue(), 'label': i % len(photographs)}

  features = {
    'image': tfds.features.Image(encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(names=list(_PHOTOGRAPHS)),
  }
  splits = {'train': (range(_COUNT), read), 'test': (range(1), read)}
  prepare.write_tfds('jpegs', '1.0.0', data_dir, lambda: (features, splits))
  return datasets.open_dataset('tfds:jpegs', data_dir=data_dir).train


def _decode(source, size, count, seed, ready, rates) -> None:
  """One of the processes of `decoders_rate`."""
  load = LoadImage(source, size, _CROP, _SCALE)
  rng = np.random.default_rng(seed)
  load(0, rng)
  ready.wait()
  start = time.perf_counter()
  for _ in range(count):
    load(int(rng.integers(len(source))), rng)
  rates.put(count / (time.perf_counter() - start))


def decoders_rate(source, size: int, count: int, processes: int) -> float:
  """Images/s of that many processes that only decode and crop."""
  spawn = multiprocessing.get_context('spawn')
  ready, rates = spawn.Barrier(processes), spawn.Queue()
  share = source, size, count // processes
  running = [
    spawn.Process(target=_decode, args=(*share, seed, ready, rates))
    for seed in range(processes)
  ]
  for process in running:
    process.start()
  total = sum(rates.get() for _ in running)
  for process in running:
    process.join()
  return total


def loader_rate(source, size, batch, batches, **options):
  """Images/s of a loader, from its third batch on."""
  loader = loaders.make_train_loader(
    source, batch_size=batch, image_size=size, **options
  )
  try:
    for _ in range(2):
      next(loader)
    start = time.perf_counter()
    for _ in range(batches):
      next(loader)
    return batch * batches / (time.perf_counter() - start)
  finally:
    loader.close()


def formats(source, folder: str, copies: int) -> dict[str, Source]:
  """The images as files, in four tars, and in four Parquet files twice."""
  kinds = {'folder': 'folder', 'wds': 'wds', 'none': 'parquet'}
  kinds, folder = kinds | {'snappy': 'parquet'}, Path(folder)
  for name in kinds:
    (folder / name).mkdir()
  images = [record.image for _ in range(copies) for record in source]
  for part in range(4):
    rows = range(part, len(images), 4)
    with tarfile.open(folder / f'wds/{part}.tar', 'w') as archive:
      for i in rows:
        (folder / f'folder/{i}.jpg').write_bytes(images[i])
        archive.add(folder / f'folder/{i}.jpg', f'{i}.jpg')
    table = pa.table({'image': [images[i] for i in rows]})
    options = {'row_group_size': 100, 'use_dictionary': False}
    for name in ('none', 'snappy'):
      file = folder / f'{name}/{part}.parquet'
      pq.write_table(table, file, compression=name, **options)
  names = {x: f'{kinds[x]}:{folder / x}' for x in kinds}
  return {x: datasets.open_images(names[x])['all'] for x in names}


def index_tars(members: int, folder: Path) -> None:
  """Prints the seconds to index tars and to open the index, and its size."""
  image, label = bytes(300), b'7'
  for part in range(100):
    with open(folder / f'{part:02d}.tar', 'wb') as stream:
      for i in range(part * members // 200, (part + 1) * members // 200):
        for name, data in ((f'{i:09d}.jpg', image), (f'{i:09d}.cls', label)):
          member = tarfile.TarInfo(name)
          member.size, member.mtime = len(data), 1.5
          stream.write(member.tobuf(tarfile.PAX_FORMAT))
          stream.write(data + bytes(-len(data) % 512))
      stream.write(bytes(1024))
  os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
  for step in ('index', 'open again'):
    start, processor = time.perf_counter(), time.process_time()
    source = datasets.open_images(f'wds:{folder}')['all']
    wall = time.perf_counter() - start
    processor = time.process_time() - processor
    print(f'{step}: {wall:.2f} s, {processor:.2f} s of processor')
  [index] = folder.glob('.rvq_jax*')
  print(f'{len(source):,} images, {index.stat().st_size / 1e6:.1f} MB')


def main() -> None:
  """Measures and prints."""
  options = common.parser(
    __doc__,
    data='',
    data_dir=None,
    size=256,
    batch=128,
    batches=16,
    repeats=5,
    workers='1,2,4',
    formats=False,
    copies=1,
    index=0,
  ).parse_args()
  cores = common.cores()
  size, batch, batches = options.size, options.batch, options.batches
  with tempfile.TemporaryDirectory() as folder:
    if options.index:
      return index_tars(options.index, Path(folder))
    if options.data:
      data = datasets.open_dataset(options.data, data_dir=options.data_dir)
      source = data.train
    else:
      source = jpegs(folder)
    random = {'crop': _CROP, 'crop_scale': _SCALE, 'in_memory': False}
    count = batch * batches
    routes = {
      'decoders': lambda: decoders_rate(source, size, count, cores),
      'threads': lambda: loader_rate(source, size, batch, batches, **random),
    }
    for workers in map(int, options.workers.split(',')):
      routes[f'workers={workers}'] = lambda workers=workers: loader_rate(
        source, size, batch, batches, num_workers=workers, **random
      )
    routes['memory'] = lambda: loader_rate(
      source, size, min(batch, len(source)), 8 * batches, in_memory=True
    )
    base = 'decoders'
    if options.formats:
      workers, base = int(options.workers.partition(',')[0]), 'folder'
      sources = formats(source, folder, options.copies)
      routes = {
        name: lambda source=source: loader_rate(
          source, size, batch, batches, num_workers=workers, **random
        )
        for name, source in sources.items()
      }
    rates = common.in_turn(routes, options.repeats)
  print(f'{options.data or "jpegs"} at {size} x {size}, batch {batch}')
  versions = common.versions('pillow', 'grain')
  print(f'{cores} cores of {platform.machine()}; {versions}')
  print(f'{"route":<20}{"images/s":>10}{"per core":>10}{f"of {base}":>13}')
  for name, values in rates.items():
    rate = statistics.median(values)
    ratio = common.ratio(values, rates[base])
    print(f'{name:<20}{rate:>10.0f}{rate / cores:>10.0f}{ratio:>13.2f}')


if __name__ == '__main__':
  main()
