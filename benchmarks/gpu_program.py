"""What the compiled train step moves and multiplies on a GPU; needs none.

  pip install "jax[cuda12]"  (or cuda13)
  python benchmarks/gpu_program.py [--size=256] [--batch_size=128]
    [--dtype=bfloat16] [--config=imagenet|imagenet_vqgan|imagenet_f16]

Reads the program that XLA compiles for an H100 (gpu_memory.py): per class of
kernel how many there are, the bytes of their inputs and outputs and, at the
bandwidth of an H200, the least time that takes. A tensor that a kernel reads
only in part counts whole, and a loop counts only its inputs and outputs, so
rows of loops are printed apart, as arithmetic. The bound counts only the
convolutions: inputs, outputs and weights, once forward and twice backward.
Assumed: 790 TFLOP/s in bfloat16, 67 in float32, 4.3 TB/s.
"""

import collections
import re
from math import nan

import common
from absent_gpu import absent_gpu
from gpu_memory import (
  BYTES,
  CONFIGS,
  array_sizes,
  compile_step,
  make_config,
  trace_step,
)

from rvq_jax import sharding
from rvq_jax.evaluation.speed import operations
from rvq_jax.models import layers

BANDWIDTH = 4.3e12
# Class of kernel -> how its name in the program begins.
CLASSES = {
  'convolutions': r'__cudnn\$conv',
  'matrix products': r'gemm|.*dot|__cublas',
  'transposes': r'.*transpose',
  'copies, padding, conversions': r'copy|loop_pad|loop_convert|wrapped',
  'loops: search, attention': r'while',
  'reductions: BatchNorm, biases, losses': r'input_.*reduce|input_reduce',
  'elementwise: BatchNorm, leaky ReLU, sums': r'loop_',
}
INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z\-]+)\((.*?)\)(?:,|$)(.*)$', re.M
)
FREE = ('get-tuple-element', 'bitcast', 'parameter', 'tuple', 'constant')


def classify(name: str) -> str:
  """The class of a kernel."""
  for label, pattern in CLASSES.items():
    if re.match(pattern, name):
      return label
  return 'other'


def moved(program: str) -> dict[str, list[int]]:
  """Class of kernel -> how many, and bytes read and written."""
  sizes, kernels = {}, collections.defaultdict(lambda: [0, 0])
  entry = program[program.index('\nENTRY') :]
  for name, shape, op, operands, rest in INSTRUCTION.findall(entry):
    sizes[name] = sum(size for _, size in array_sizes(shape))
    if op in FREE:
      continue
    target = re.search('custom_call_target="([^"]*)"', rest)
    row = kernels[classify(target[1] if target else name)]
    row[0] += 1
    inputs = set(re.findall(r'%([\w.\-]+)', operands))
    row[1] += sizes[name] + sum(sizes.get(x, 0) for x in inputs)
  return dict(kernels)


def convolution_bytes(side: int, batch: int, width: int) -> int:
  """Inputs, outputs, weights of all convolutions, once and twice more."""
  maps, weights = 0, 0
  sides = [side, side // 2, side // 4, side // 8]
  channels = [3, 64, 128, 256]
  for i in range(3):  # down, and up again
    ends = sum(sides[j] ** 2 * channels[j] for j in (i, i + 1))
    maps += 2 * ends
    weights += (9 + 16) * channels[i] * channels[i + 1]
  maps += (24 + 2) * 2 * sides[3] ** 2 * 256  # 1x1 at both ends of the grid
  weights += 24 * 9 * 256**2 + 2 * 256**2
  return 3 * width * (batch * maps + weights)


def main():
  """Prints the table, the bound and the arithmetic."""
  parser = common.parser(
    __doc__, size=256, batch_size=128, dtype='bfloat16', config=CONFIGS
  )
  args = parser.parse_args()
  layers._has_fused_attention = lambda: False  # cuDNN need not be there
  config = make_config(args.config, args.dtype, args.batch_size, args.size)
  step = trace_step(sharding.data_mesh([absent_gpu()]), config)
  kernels = moved(compile_step(step).as_text())
  width = BYTES['bf16' if args.dtype == 'bfloat16' else 'f32']
  paper = config.model.network == 'paper'
  bound = convolution_bytes(args.size, args.batch_size, width) if paper else nan
  total = sum(row[1] for row in kernels.values())
  print(common.header('kernels', 'how many', 'GB', 'ms', '/ bound'))
  rows = sorted(kernels.items(), key=lambda row: -row[1][1])
  launches = sum(row[0] for row in kernels.values())
  for label, (count, nbytes) in [*rows, ('all', (launches, total))]:
    gb, ms = nbytes / 1e9, 1e3 * nbytes / BANDWIDTH
    share = f'{nbytes / bound:.2f}'
    print(common.row(label, count, f'{gb:.2f}', f'{ms:.2f}', share))
  half, full = common.TENSOR_CORES, common.FLOAT32
  peak = half if args.dtype == 'bfloat16' else full
  if not paper:
    count = operations(step.jaxpr)
    print(f'\nstep: {count / 1e12:.2f} TFLOP, {1e3 * count / peak:.1f} ms')
    return
  print(f'\nbound: {bound / 1e9:.2f} GB, {1e3 * bound / BANDWIDTH:.2f} ms')
  rest, search = common.flops(config)
  print(f'model: {rest / 1e12:.2f} TFLOP, {1e3 * rest / peak:.1f} ms')
  print(f'search: {search / 1e12:.2f} TFLOP, {1e3 * search / full:.1f} ms')


if __name__ == '__main__':
  main()
