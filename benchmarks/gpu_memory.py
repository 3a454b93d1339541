"""Memory of the ImageNet step on an H100, by XLA's analysis; needs no GPU.

  pip install "jax[cuda12]"
  python benchmarks/gpu_memory.py [--batch_size=128] [--image_size=256]
    [--config=imagenet|imagenet_vqgan] [--accumulate_steps=1]

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

from configs import imagenet, imagenet_vqgan  # noqa: E402
from rvq_jax import sharding  # noqa: E402
from rvq_jax.models import layers, lpips_weights  # noqa: E402
from rvq_jax.training import config as config_lib  # noqa: E402
from rvq_jax.training.build import build_model, build_objective  # noqa: E402
from rvq_jax.training.optimizer import make_optimizer  # noqa: E402
from rvq_jax.training.state import create_state  # noqa: E402
from rvq_jax.training.step import TrainStep  # noqa: E402

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
CONFIGS = {'imagenet': imagenet, 'imagenet_vqgan': imagenet_vqgan}
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


def make_config(name, dtype, batch_size, image_size):
  """A config of `CONFIGS` with these sizes."""
  config = CONFIGS[name].get_config()
  config.model.dtype, config.batch_size = dtype, batch_size
  config.data.image_size = image_size
  return config


def compile_step(mesh, config):
  """The compiled train step of a config, its last phase."""
  flat = config_lib.check_config(config)
  image_size, batch_size = flat['data.image_size'], flat['batch_size']
  model = build_model(flat)
  objective = build_objective(flat, 1000)
  optimizer = make_optimizer(
    lambda _: 2e-4, clip_norm=flat['optimizer.clip_norm']
  )
  state = jax.eval_shape(
    lambda key: create_state(
      model,
      optimizer,
      key,
      image_size=image_size,
      batch_size=batch_size // flat['accumulate_steps'],
      params_ema=flat['optimizer.params_ema'] > 0,
      discriminator=objective.init_discriminator(key, image_size),
    ),
    jax.random.key(0),
  )
  weights = lpips_weights.load() if objective.perceptual_weight else None
  shape = (batch_size, image_size, image_size, 3)
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    TrainStep(
      model,
      optimizer,
      params_ema_decay=flat['optimizer.params_ema'],
      accumulate_steps=flat['accumulate_steps'],
      objective=objective,
      adversarial=objective.adversarial_weight > 0,
    ),
    in_shardings=(everywhere, sharding.by_rows(mesh), everywhere),
    out_shardings=everywhere,
    donate_argnums=0,
  )
  images = {'image': jax.ShapeDtypeStruct(shape, jnp.uint8)}
  lowered = step.lower(state, images, weights)
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
  parser.add_argument('--accumulate_steps', type=int, default=1)
  parser.add_argument('--config', choices=CONFIGS, default='imagenet')
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
    config = make_config(args.config, dtype, args.batch_size, args.image_size)
    config.model.remat = remat
    config.accumulate_steps = args.accumulate_steps
    try:
      step = compile_step(mesh, config)
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
