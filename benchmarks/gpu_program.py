"""What a train step moves, multiplies and holds on a GPU; needs none.

  pip install "jax[cuda12]"  (or cuda13)
  python benchmarks/gpu_program.py [--config imagenet imagenet_f16:64 ...]
    [--gpu=H200|H100] [--dtype bfloat16 float32] [--remat] [--kernels=N]

XLA compiles a config at its batch, or that after the colon, for an H100 that it
is only told about (no autotuning, which would need the device), and this reads
the program. GB: inputs and outputs of every kernel, of a slice only what it
takes; loops count as often as they run. ms: of each kernel its products at
NVIDIA's dense peak or its bytes at the bandwidth, whichever takes longer; no
launches, no caches, no losses. In norms: the bytes of all kernels that do any
part of a BatchNorm or GroupNorm, without convolutions. `--kernels` adds classes
of kernels and the N that move most. `--cudnn` attends by cuDNN's kernel, which
must be there to compile.
"""

import collections
import re
from math import prod

import common
import jax
import jax.numpy as jnp
import numpy as np
from absent_gpu import absent_gpu

from rvq_jax import sharding
from rvq_jax.evaluation.machine import PEAKS
from rvq_jax.evaluation.speed import operations
from rvq_jax.models import layers, lpips_weights
from rvq_jax.training.step import compile_init, jit_step

BANDWIDTH = {'H200': 4.8e12, 'H100': 3.35e12}  # bytes/s, SXM, by NVIDIA
HALF, TF32, FULL = (1e12 * x for x in PEAKS['GH200|H200|H100'])
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'u8': 1, 'pred': 1}
# Class of kernel -> where it is in the model, else how its name begins.
PLACES = {'search': r'jit\(search\)', 'attention': r'/\w*att(ention|n\d*)/'}
CLASSES = {
  'convolutions': 'cudnn-conv',
  'transposes': '.*transpose',
  'copies, padding, conversions': 'copy|loop_pad|loop_convert|wrapped',
  'reductions': '.*reduce',
  'elementwise': 'loop_',
  'other': '',
}
INSTRUCTION = re.compile(
  r'^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z\-]+)\((.*?)\)(?:,|$)(.*)$', re.M
)
Instruction = collections.namedtuple(
  'Instruction', 'root name shape op args on'
)
FREE = ('get-tuple-element', 'bitcast', 'parameter', 'tuple', 'constant')
NORM = re.compile(r'/([bg]n|\w*norm\w*/norm)/')
Kernel = collections.namedtuple('Kernel', 'label name count bytes ms norm of')


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
  """The compiled step of `trace_step`; its kernels are not optimized."""
  options = {'xla_gpu_autotune_level': 0, 'xla_backend_optimization_level': 0}
  return traced.lower().compile(compiler_options=options)


def arrays(text):
  """(name, bytes) of each array that a text names, as ('f32[2,3]', 24)."""
  for dtype, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', text):
    yield f'{dtype}[{shape}]', BYTES.get(dtype, 0) * prod(sides(f'[{shape}]'))


def size(text) -> int:
  """Bytes of all arrays that a text names."""
  return sum(nbytes for _, nbytes in arrays(text))


def sides(text) -> list[int]:
  """The sides of the first array that a text names."""
  return [*map(int, re.findall(r'\d+', re.search(r'\[(.*?)\]', text)[1]))]


def names(text) -> list[str]:
  """The instructions or computations that a text names."""
  return re.findall(r'%([\w.\-]+)', text)


def parse(text) -> tuple[dict, str]:
  """Computation -> {name: `Instruction`} of a program, and the first of all."""
  blocks = re.split(r'\n(?=%|ENTRY )', text)[1:]
  found = [[Instruction(*x) for x in INSTRUCTION.findall(b)] for b in blocks]
  parts = [names(block)[0] for block in blocks]
  entry = next(p for p, b in zip(parts, blocks, strict=True) if b[0] == 'E')
  contents = [{x.name: x for x in instructions} for instructions in found]
  return dict(zip(parts, contents, strict=True)), entry


def kernels(program, part, bandwidth, count=1):
  """Yields each `Kernel` of a computation, with how often it runs."""
  for x in program[part].values():
    inner = [name for name in names(x.on) if name in program]
    if x.op == 'while':
      trips = int(re.search(r'"known_trip_count":{"n":"(\d+)"', x.on)[1])
      yield from kernels(program, inner[1], bandwidth, trips * count)
    elif x.op == 'conditional':  # the other branch fills the codebook, once
      branches = ([*kernels(program, p, bandwidth, count)] for p in inner)
      yield from min(branches, key=lambda found: sum(k.bytes for k in found))
    elif x.op == 'call':
      yield from kernels(program, inner[0], bandwidth, count)
    elif x.op not in FREE:
      inside = program[inner[0]] if x.op == 'fusion' else program[part]
      work = inside.values() if x.op == 'fusion' else [x]
      moved = written(x, inside) + sum(
        min(size(program[part][name].shape), read(x, inside, i))
        for i, name in enumerate(dict.fromkeys(names(x.args)))
      )
      seconds = sum(products(y, inside) for y in work)
      on = [re.search('op_name="(.*?)"', y.on) for y in (x, *work)]
      on = [found[1] for found in on if found]
      of = on[0] if on else ''
      label = classify(x.name, of, seconds)
      norm = not seconds and any(map(NORM.search, on))
      ms = 1e3 * max(seconds, moved / bandwidth)
      yield Kernel(label, x.name, count, count * moved, count * ms, norm, of)


def classify(name, of, seconds) -> str:
  """The class of a kernel, its place in the model and the time of products."""
  places = [c for c, part in PLACES.items() if re.search(part, of)]
  names = [c for c, begin in CLASSES.items() if re.match(begin, name)]
  if seconds and names[0] != 'convolutions':
    names = ['other matrix products']
  return (places + names)[0]


def read(x, inside, i) -> float:
  """Bytes that a fusion takes of its input i at most, by its slices."""
  if x.op != 'fusion':
    return float('inf')
  total = 0
  todo = [
    y.name for y in inside.values() if (y.op, y.args) == ('parameter', str(i))
  ]
  for name in todo:
    for y in inside.values():
      if name not in (inputs := names(y.args)):
        continue
      if y.op == 'bitcast':
        todo.append(y.name)
      elif y.op in ('dynamic-slice', 'slice', 'gather') and name == inputs[0]:
        total += size(y.shape)
      elif y.op != 'dynamic-update-slice' or name != inputs[0]:  # in place
        return float('inf')
  return total


def written(x, inside) -> int:
  """Bytes that a kernel writes: of an array updated in place the new part."""
  if x.op == 'fusion':
    (root,) = (y for y in inside.values() if y.root)
    if root.op == 'dynamic-update-slice':
      return size(inside[names(root.args)[1]].shape)
  return size(x.shape)


def products(x, inside) -> float:
  """Seconds of a convolution or matrix product at the peak; 0 of the others."""
  inputs = [inside[name].shape for name in names(x.args) if name in inside]
  if 'cudnn$conv' in x.on:
    kernel, out = {
      'Forward': (inputs[1], x.shape),
      'BackwardInput': (inputs[1], inputs[0]),
      'BackwardFilter': (x.shape, inputs[-1]),
    }[re.search(r'conv(?:BiasActivation)?(\w+)"', x.on)[1]]
    channels = re.search(r'->(\w+)', x.on)[1].index('f')
    count = prod(sides(kernel)) * prod(sides(out)) / sides(out)[channels]
  elif found := re.search(r'lhs_contracting_dim\w+"?[=:][\[{](.*?)[\]}]', x.on):
    axes = map(int, re.findall(r'\d+', found[1]))
    count = prod(sides(x.shape)) * prod(sides(inputs[0])[a] for a in axes)
  else:
    return 0.0
  peak = FULL if 'highest' in x.on.lower() else TF32
  return 2 * count / (peak if inputs[0].startswith('f32') else HALF)


def report(found, text, bandwidth, most):
  """Two tables: classes of kernels, and those that move most."""
  yield common.header('kernels', 'how many', 'GB', 'ms by bytes', 'ms')
  groups = collections.defaultdict(list)
  for x in found:
    for label in (x.label, 'all'):
      groups[label].append(x)
  for label, group in sorted(groups.items(), key=lambda g: total(g[1])):
    moved, ms = total(group), sum(x.ms for x in group)
    count = sum(x.count for x in group)
    cells = f'{moved / 1e9:.2f}', f'{1e3 * moved / bandwidth:.2f}', f'{ms:.2f}'
    yield common.row(label, count, *cells)
  yield '\n' + common.header('kernel', 'GB', 'ms', 'of')
  for x in sorted(found, key=lambda x: -x.bytes)[:most]:
    name = f'{x.count} x {x.name}'
    yield common.row(name, f'{x.bytes / 1e9:.2f}', f'{x.ms:.2f}', x.of)
  name, nbytes = max(arrays(text), key=lambda x: x[1])
  yield f'\nlargest array: {name}, {nbytes / 1e9:.2f} GB\n'


def total(found) -> int:
  """Bytes that kernels move."""
  return sum(x.bytes for x in found)


def main():
  """Compiles each config and prints a line for it."""
  parser = common.parser(
    __doc__,
    config=['imagenet', 'imagenet_vqgan', 'imagenet_f16:64'],
    **{'gpu': tuple(BANDWIDTH), 'dtype': ['bfloat16'], 'image_size': 256},
    **{'remat': False, 'cudnn': False, 'kernels': 0},
  )
  args = parser.parse_args()
  layers._has_fused_attention = lambda: args.cudnn
  mesh, bandwidth = sharding.data_mesh([absent_gpu()]), BANDWIDTH[args.gpu]
  peaks = f'{HALF / 1e12:g} TFLOP/s in bfloat16, {TF32 / 1e12:g} in TF32'
  print(
    f'{args.gpu}: {bandwidth / 1e12:g} TB/s, {peaks}, {FULL / 1e12:g} in '
    f'float32 (the search); {common.versions("jax", "jaxlib")}\n'
  )
  columns = 'TFLOP', 'GB moved', 'in norms', 'memory, GB', 'ms', 'images/s'
  print(common.header('config', 'batch', *columns))
  for which in args.config:
    name, _, batch = which.partition(':')
    for dtype in args.dtype:
      config = common.load_config(name)
      config.batch_size = int(batch or config.batch_size)
      config.model.dtype, config.model.remat = dtype, args.remat
      config.data.image_size = args.image_size
      traced = trace_step(mesh, config)
      step = compile_step(traced)
      text, memory = step.as_text(), step.memory_analysis()
      found = [*kernels(*parse(text), bandwidth)]
      ms, moved = sum(x.ms for x in found), total(found)
      held = memory.temp_size_in_bytes + memory.argument_size_in_bytes
      print(
        common.row(
          f'{name}, {dtype}' + ', remat' * args.remat,
          config.batch_size,
          f'{operations(traced.jaxpr) / 1e12:.2f}',
          f'{moved / 1e9:.1f}',
          f'{total([x for x in found if x.norm]) / moved:.0%}',
          f'{held / 1e9:.2f}',
          f'{ms:.1f}',
          f'{1e3 * config.batch_size / ms:,.0f}',
        ),
        flush=True,
      )
      if args.kernels:
        print('', *report(found, text, bandwidth, args.kernels), sep='\n')


if __name__ == '__main__':
  main()
