"""Memory of the ImageNet step on an H100, by XLA's analysis; needs no GPU.

  pip install "jax[cuda12]"  (or cuda13)
  python benchmarks/gpu_memory.py [--batch_size=128] [--image_size=256]
    [--config=imagenet|imagenet_vqgan|imagenet_f16] [--accumulate_steps=1]

XLA compiles for a GPU that it is only told about (no autotuning, which would
need the device), and says how much memory the program takes beside its
arguments. Nothing is run, so this is no measurement of time. The packages
jax-cuda12-plugin and jax-cuda12-pjrt, or both of cuda13, are enough for the
rows without cuDNN.
"""

import itertools
import math
import re

import common
import jax
import jax.numpy as jnp
import numpy as np
from absent_gpu import absent_gpu

from rvq_jax import sharding
from rvq_jax.models import layers, lpips_weights
from rvq_jax.training.step import compile_init, jit_step

CONFIGS = ('imagenet', 'imagenet_vqgan', 'imagenet_f16')
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'u8': 1, 'pred': 1}


def make_config(name, dtype, batch_size, image_size):
  """A config of `CONFIGS` with these sizes."""
  config = common.load_config(name)
  config.model.dtype, config.batch_size = dtype, batch_size
  config.data.image_size = image_size
  return config


def trace_step(mesh, config):
  """The traced train step of a config, its last phase."""
  step, size = common.make_step(config)[1], config.data.image_size
  state = compile_init(step, mesh, size, config.batch_size)
  state = state.eval_shape(jax.random.key(0))
  images = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8)
  weights = lpips_weights.load() if step.objective.perceptual_weight else None
  seed = np.int32(step.seed)
  return jit_step(mesh).trace(step, seed, state, {'image': images}, weights)


def compile_step(traced):
  """The compiled step of `trace_step`."""
  options = {'xla_gpu_autotune_level': 0}
  return traced.lower().compile(compiler_options=options)


def array_sizes(text):
  """(name, bytes) of each array that a text names, as ('f32[2,3]', 24)."""
  for dtype, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', text):
    sides = map(int, filter(None, shape.split(',')))
    yield f'{dtype}[{shape}]', BYTES.get(dtype, 0) * math.prod(sides)


def main():
  """Compiles each case and prints a line for it."""
  sizes = {'batch_size': 128, 'image_size': 256, 'accumulate_steps': 1}
  args = common.parser(__doc__, config=CONFIGS, **sizes).parse_args()
  mesh = sharding.data_mesh([absent_gpu()])
  columns = 'dtype', 'remat', 'attention', 'temporaries, GB', 'state, GB'
  print(common.header(*columns, 'largest'))
  kinds = ('float32', False), ('bfloat16', False), ('bfloat16', True)
  for (dtype, fused), remat in itertools.product(kinds, (False, True)):
    layers._has_fused_attention = lambda fused=fused: fused
    jax.clear_caches()
    config = make_config(args.config, dtype, args.batch_size, args.image_size)
    config.model.remat = remat
    config.accumulate_steps = args.accumulate_steps
    try:
      step = compile_step(trace_step(mesh, config))
    except RuntimeError as error:
      if not fused or 'cuDNN not found' not in str(error):
        raise
      print(common.row(dtype, remat, 'cuDNN', 'not compiled: no cuDNN', '', ''))
      continue
    memory = step.memory_analysis()
    name, size = max(array_sizes(step.as_text()), key=lambda x: x[1])
    sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    print(
      common.row(
        *(dtype, remat, 'cuDNN' if fused else 'XLA'),
        *(f'{x / 1e9:.2f}' for x in sizes),
        f'{name}, {size / 1e9:.2f} GB',
      ),
      flush=True,
    )


if __name__ == '__main__':
  main()
