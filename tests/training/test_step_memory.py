"""The ImageNet step at batch 128: nothing of size N x K, under 10 GB."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rvq_jax import sharding
from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_step
from rvq_jax.training.step import compile_init

ROOT = Path(__file__).resolve().parents[2]
BATCH, SIDE = 128, 256
MESH = sharding.data_mesh(jax.devices('cpu')[:1])
GPU_COMPILER = pytest.mark.skipif(
  not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)),
  reason="needs jax's plugin and pjrt of cuda12 or cuda13 to compile for a GPU",
)


@pytest.mark.slow
def test_no_array_of_the_step_is_as_large_as_vectors_times_codes(load_config):
  config = load_config('imagenet')
  config.model.num_res_blocks = 1  # blocks are alike
  flat = config_lib.check_config(config)
  step = build_step(flat, 10**6)
  state = compile_init(step, MESH, SIDE, BATCH).eval_shape(jax.random.key(0))
  images = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.uint8)
  text = jax.jit(step).lower(state, {'image': images}).as_text()
  sizes = {
    math.prod(map(int, shape.split('x')))
    for shape in re.findall(r'tensor<((?:\d+x)*\d+)x\w+>', text)
  }
  vectors = BATCH * (SIDE // flat['model.factor']) ** 2
  assert BATCH * SIDE * SIDE * 3 in sizes  # the shapes were found
  assert max(sizes) < vectors * flat['model.codebook_size']


@pytest.mark.slow
def test_making_the_state_takes_no_memory_for_the_batch(load_config):
  step = build_step(config_lib.check_config(load_config('photos')), 10**6)

  def memory(batch_size):
    program = compile_init(step, MESH, 64, batch_size)
    compiled = program.lower(jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(1000) == memory(1)


@pytest.mark.slow
@GPU_COMPILER
def test_the_imagenet_step_holds_and_moves_no_more_than_docs_say():
  command = [sys.executable, ROOT / 'benchmarks/gpu_program.py', '--kernels=1']
  output = subprocess.check_output([*command, '--config=imagenet'], text=True)
  rows = [line.split('|') for line in output.splitlines()]
  rows = {row[1].strip(): row[2:] for row in rows if len(row) > 5}
  assert float(rows['imagenet, bfloat16'][4]) < 10  # GB
  rows = {n: row for n, row in rows.items() if row[0].strip().isdigit()}
  moved = {n: float(row[1]) for n, row in rows.items() if len(row) == 5}
  loops = moved['search'] + moved['attention']
  assert moved['all'] - loops < 3.3 * moved['convolutions']
  # A feature map in another layout or in float32 would be 0.5 or more.
  other = moved['transposes'] + moved['copies, padding, conversions']
  assert other < 0.25 * moved['convolutions']
  # N x K would be 8.6 GB, the input of a transposed convolution with zeros
  # written between its elements 1.1 GB.
  assert float(output.split()[-2]) < 0.6
