"""Memory of the ImageNet step on an H100, by XLA's analysis; needs no GPU.

  pip install "jax[cuda12]"
  python benchmarks/gpu_memory.py [--batch_size=128] [--image_size=256]

XLA compiles for a GPU that it is only told about (no autotuning, which would
need the device), and says how much memory the program takes beside its
arguments. Nothing is run, so this is no measurement of time. The packages
jax-cuda12-plugin and jax-cuda12-pjrt are enough for the rows without cuDNN.
"""

import argparse
import os
import pathlib
import re
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from configs import imagenet  # noqa: E402
from rvq_jax.models import layers  # noqa: E402
from rvq_jax.quantize import search  # noqa: E402
from rvq_jax.training import config as config_lib  # noqa: E402
from rvq_jax.training import sharding  # noqa: E402
from rvq_jax.training.optimizer import make_optimizer  # noqa: E402
from rvq_jax.training.state import create_state  # noqa: E402
from rvq_jax.training.step import make_train_step  # noqa: E402

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# This process has no GPU to ask what fits it.
TILES = search.tile_sizes
search.tile_sizes = lambda n, k, _: TILES(n, k, 'gpu')
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'u8': 1, 'pred': 1}


def absent_gpu():
  """An H100 that programs can be compiled for and that need not be there."""
  try:
    (device,) = topologies.get_topology_desc(
      platform='cuda', target_config=H100, topology='1x1x1'
    ).devices
  except NotImplementedError:
    sys.exit('needs the CUDA plugin: pip install "jax[cuda12]"')
  return device


def compile_step(mesh, dtype, remat, batch_size, image_size):
  """The compiled train step of configs/imagenet.py."""
  config = imagenet.get_config()
  config.model.dtype, config.model.remat = dtype, remat
  config.data.image_size = image_size
  model = config_lib.build_model(config_lib.check_config(config))
  optimizer = make_optimizer(2e-4, weight_decay=0.01)
  state = jax.eval_shape(
    lambda key: create_state(
      model, optimizer, key, image_size=image_size, batch_size=batch_size
    ),
    jax.random.key(0),
  )
  shape = (batch_size, image_size, image_size, 3)
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    make_train_step(model, optimizer),
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
    donate_argnums=0,
  )
  lowered = step.lower(state, {'image': jax.ShapeDtypeStruct(shape, jnp.uint8)})
  return lowered.compile(compiler_options={'xla_gpu_autotune_level': 0})


def largest(text):
  """Bytes and shape of the largest array that the program names."""
  sizes = {}
  for dtype, shape in re.findall(r'\b(\w+)\[([\d,]+)\]', text):
    size = BYTES.get(dtype, 0)
    for side in shape.split(','):
      size *= int(side)
    sizes[f'{dtype}[{shape}]'] = size
  name = max(sizes, key=sizes.get)
  return sizes[name], name


def main():
  """Compiles each case and prints a line for it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--image_size', type=int, default=256)
  args = parser.parse_args()
  mesh = sharding.data_mesh([absent_gpu()])
  print('| dtype | remat | attention | temporaries, GB | state, GB | largest |')
  print('|---|---|---|---|---|---|')
  for dtype, remat, fused in (
    ('float32', False, False),
    ('float32', True, False),
    ('bfloat16', False, False),
    ('bfloat16', True, False),
    ('bfloat16', False, True),
    ('bfloat16', True, True),
  ):
    layers._has_fused_attention = lambda fused=fused: fused
    jax.clear_caches()
    try:
      step = compile_step(mesh, dtype, remat, args.batch_size, args.image_size)
    except RuntimeError as error:
      if not fused or 'cuDNN not found' not in str(error):
        raise
      print(f'| {dtype} | {remat} | cuDNN | not compiled: no cuDNN | | |')
      continue
    memory = step.memory_analysis()
    size, name = largest(step.as_text())
    print(
      f'| {dtype} | {remat} | {"cuDNN" if fused else "XLA"} '
      f'| {memory.temp_size_in_bytes / 1e9:.2f} '
      f'| {memory.argument_size_in_bytes / 1e9:.2f} '
      f'| {name}, {size / 1e9:.2f} GB |',
      flush=True,
    )


if __name__ == '__main__':
  main()
