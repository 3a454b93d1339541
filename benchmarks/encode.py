"""What encoding a data set costs beside decoding its images.

python benchmarks/encode.py [--images=1024] [--repeats=5]

Two sets: JPEGs of ImageNet's mean size scaled to 256 x 256, and the crops of
photographs (64 x 64).

  decode       the images only, as `encode_dataset` decodes them
  constant     `encode_dataset` with a model that returns ids 0
  model        `encode_dataset` with the model of configs/photos.py

on one and on eight CPU devices. The routes take turns; the first four batches
of each, in which it compiles, are left out. Printed are medians of images/s, of
their ratio to `decode` in the same turn, and of processor time per image, which
other work on the machine disturbs less.
"""

import functools
import os
import tempfile
import time

import common
import input_pipeline
import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.data import datasets, decoding
from rvq_jax.data.transforms import resize_and_center_crop
from rvq_jax.tokenizer import encoding
from rvq_jax.tokenizer.tokenizer import Tokenizer

FIRST = 4  # batches


class Constant:
  """Stands in for a `VQVAE`: ids 0."""

  def apply(self, variables, images, *, method):
    """The ids of images [B, h, w, 3], at factor 4."""
    batch, height, width, _ = images.shape
    return jnp.zeros((batch, height // 4, width // 4), jnp.int32)


class Clock:
  """Stands in for the progress bar: wall and processor time of each batch."""

  def __init__(self, **_):
    self.times = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def update(self, count: int) -> None:
    """A batch of `count` images is done."""
    self.times.append((count, time.perf_counter(), time.process_time()))

  def per_image(self) -> np.ndarray:
    """Seconds and processor seconds per image behind the first batches."""
    count = sum(count for count, *_ in self.times[FIRST:])
    return np.subtract(self.times[-1][1:], self.times[FIRST - 1][1:]) / count


def decode(source, size: int) -> np.ndarray:
  """See `Clock.per_image`."""
  batch, clock = encoding.batch_size(size), Clock()
  crop = functools.partial(resize_and_center_crop, size=size)
  errors, rows = decoding.DecodeErrors(len(source)), range(len(source))
  decoded = decoding.decode_ahead(source, rows, crop, errors, 2 * batch)
  for i, _ in enumerate(decoded, 1):
    if i % batch == 0 or i == len(source):
      clock.update((i - 1) % batch + 1)
  return clock.per_image()


def encode(tokenizer, devices: int, source, size: int) -> np.ndarray:
  """See `Clock.per_image`."""
  clock, local_devices = Clock(), jax.local_devices
  encoding.tqdm = lambda **_: clock
  jax.local_devices = lambda: local_devices()[:devices]
  try:
    with tempfile.TemporaryDirectory() as folder:
      encoding.encode_dataset(
        tokenizer, source, f'{folder}/tokens', image_size=size
      )
  finally:
    jax.local_devices = local_devices
  return clock.per_image()


def main() -> None:
  """Measures and prints."""
  options = common.parser(__doc__, images=1024, repeats=5).parse_args()
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
  model = common.untrained(common.load_config('photos'))
  constant = Tokenizer(Constant(), model.variables, config=model.config, step=0)
  with tempfile.TemporaryDirectory() as folder:
    jpegs = input_pipeline.jpegs(folder).subset(np.arange(options.images))
    crops = datasets.open_dataset('photos', split='official').train
    sets = {('JPEGs', 256): jpegs, ('crops', 64): crops}
    print(f'{common.cores()} cores, {jax.device_count()} devices')
    for (name, size), source in sets.items():
      routes = {'decode': functools.partial(decode, source, size)} | {
        f'{kind}, {devices}': functools.partial(
          encode, tokenizer, devices, source, size
        )
        for kind, tokenizer in (('constant', constant), ('model', model))
        for devices in (1, 8)
      }
      per_image = common.in_turn(routes, options.repeats)
      print(f'\n{name} at {size} x {size}, {len(source)} images')
      print(f'{"":<14}{"images/s":>10}{"of decode":>11}{"processor ms":>14}')
      walls = {route: [t[0] for t in x] for route, x in per_image.items()}
      for route, times in per_image.items():
        wall, used = np.median(times, axis=0)
        ratio = common.ratio(walls['decode'], walls[route])
        print(f'{route:<14}{1 / wall:>10.0f}{ratio:>11.2f}{1e3 * used:>14.2f}')


if __name__ == '__main__':
  main()
