"""Time of one training step of the paper's model, beside PyTorch's.

  python benchmarks/train_step.py [--peer] [--repeats N] [--json FILE]
    [--size 32:128 ...] [--dtype float32|bfloat16] [--memory kept|default]
    [--profile DIR]

The model of configs/cifar10.py (f8, D = 256, six residual blocks, K = 16384) at
32x32 with 128 images a step and at 256x256 with 8. Forms alternate in one
process; printed are medians, ratios, compile time, memory and, by the formulas
of docs/scale.md, FLOPs a second. `--peer` adds the same model in PyTorch
(torch_model.py) with vector-quantize-pytorch's quantizer and with one as good
as ours (`pip install torch vector-quantize-pytorch`). `--memory=kept` has the C
library keep freed memory, for every form, as our launchers do.
`--profile` writes a trace of our step for TensorBoard or Perfetto.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

CORES = 2
# Before JAX and torch count the cores; whoever imports this keeps all.
if __name__ == '__main__' and hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ('', 'benchmarks', 'launch')]

import command_line  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs import cifar10  # noqa: E402
from rvq_jax.models import lpips_weights  # noqa: E402
from rvq_jax.paper import report as provenance  # noqa: E402
from rvq_jax.training import config as config_lib  # noqa: E402
from rvq_jax.training.build import build_model, build_objective  # noqa: E402
from rvq_jax.training.optimizer import make_optimizer  # noqa: E402
from rvq_jax.training.state import create_state  # noqa: E402
from rvq_jax.training.step import TrainStep  # noqa: E402

OURS, PEER, TUNED = (
  'rvq_jax',
  'torch, vector-quantize-pytorch',
  'torch, a quantizer as good as ours',
)
# image side -> greatest time of our step as a share of (PEER, TUNED).
TARGETS = {32: (0.60, 1.0), 256: (0.50, 1.0)}


def flops(side, batch):
  """Operations of a step; XLA's own count takes each loop for one pass."""
  tokens = (side // 8) ** 2
  convolutions = 24 * 9 * 256**2 + 27_648 + 4 * 73_728 + 294_912
  transposed = 16 * (32_768 + 4 * 8_192 + 16 * 192)
  attention = 2 * tokens * 256
  model = convolutions + transposed + 6 * 256**2 + attention
  return 2 * batch * tokens * (3 * model + 16384 * 256)


def our_step(config, steps=1):
  """A call that trains `steps` steps, compile time and XLA's own counts."""
  side, batch = config.data.image_size, config.batch_size
  flat = config_lib.check_config(config)
  model = build_model(flat)
  objective = build_objective(flat, 1000)
  weights = lpips_weights.load() if objective.perceptual_weight else None
  optimizer = make_optimizer(lambda _: 2e-4)
  state = jax.jit(
    lambda key: create_state(
      *(model, optimizer, key),
      image_size=side,
      batch_size=batch,
      discriminator=objective.init_discriminator(key, side),
    )
  )(jax.random.key(0))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
  images = {'image': jax.device_put(images)}
  start = time.perf_counter()
  step = (
    jax.jit(
      TrainStep(
        model,
        optimizer,
        objective=objective,
        adversarial=objective.adversarial_weight > 0,
      ),
      donate_argnums=0,
    )
    .lower(state, images, weights)
    .compile()
  )
  seconds = time.perf_counter() - start

  def call():
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, images, weights)
    jax.block_until_ready(metrics)

  memory = step.memory_analysis()
  return call, {
    'compile_s': seconds,
    'flops': flops(side, batch),
    'xla_temp_bytes': memory.temp_size_in_bytes,
  }


def torch_step(side, batch, name):
  """A call that trains one step of the model in PyTorch."""
  try:
    import torch
    import torch_model
    from vector_quantize_pytorch import VectorQuantize
  except ImportError as error:
    sys.exit(f'--peer needs torch and vector-quantize-pytorch: {error}')
  torch.set_num_threads(CORES)
  torch.manual_seed(0)
  if name == PEER:
    quantizer = VectorQuantize(
      dim=256,
      codebook_size=16384,
      decay=0.99,
      commitment_weight=0.25,
      rotation_trick=True,
      kmeans_init=False,
      threshold_ema_dead_code=2,
    )
  else:
    quantizer = torch_model.TiledQuantizer(16384, 256)
  model = torch_model.Model(quantizer).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
  images = torch.rand(batch, 3, side, side) * 2 - 1

  def call():
    optimizer.zero_grad(set_to_none=True)
    reconstruction, loss = model(images)
    (torch.mean((reconstruction - images) ** 2) + loss).backward()
    optimizer.step()

  return call, {}


def measure(side, batch, args):
  """name -> median ms, all times and what the compiler counted."""
  calls, records = {}, {}
  for name in [OURS] + [PEER, TUNED] * args.peer:
    if name == OURS:
      config = cifar10.get_config('f8')
      config.data.image_size, config.batch_size = side, batch
      config.model.dtype = args.dtype
      calls[name], records[name] = our_step(config)
    else:
      calls[name], records[name] = torch_step(side, batch, name)
    records[name]['all_ms'] = []
    calls[name]()
  if args.profile:
    with jax.profiler.trace(str(args.profile / f'{side}')):
      calls[OURS]()
  for _ in range(args.repeats):
    for name, call in calls.items():
      time.sleep(0.1)
      start = time.perf_counter()
      call()
      records[name]['all_ms'].append(1e3 * (time.perf_counter() - start))
  for record in records.values():
    record['ms'] = statistics.median(record['all_ms'])
  return records


def report(side, batch, records):
  """A Markdown table of one size and a line for each target."""
  yield f'\n{side}x{side}, batch {batch}\n'
  yield '| form | ms | least | ours / it | images/s |'
  yield '|---|---|---|---|---|'
  ours = records[OURS]
  for name, row in records.items():
    yield (
      f'| {name} | {row["ms"]:.0f} | {min(row["all_ms"]):.0f} '
      f'| {ours["ms"] / row["ms"]:.3f} | {1e3 * batch / row["ms"]:.1f} |'
    )
  yield (
    f'\ncompile {ours["compile_s"]:.1f} s, {ours["flops"] / 1e9:.0f} GFLOP a '
    f'step, {ours["flops"] / ours["ms"] / 1e6:.0f} GFLOP/s, XLA temporaries '
    f'{ours["xla_temp_bytes"] / 2**20:.0f} MiB'
  )
  for name, target in zip((PEER, TUNED), TARGETS.get(side, ()), strict=False):
    if name in records:
      ratio = ours['ms'] / records[name]['ms']
      met = 'met' if ratio <= target else 'NOT met'
      yield f'- ours / {name}: {ratio:.3f}, target {target:g}: {met}'


def main():
  """Parses the command line, measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peer', action='store_true')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--profile', type=pathlib.Path)
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument(
    '--memory', choices=('kept', 'default'), default='default'
  )
  parser.add_argument('--size', nargs='+', default=['32:128', '256:8'])
  args = parser.parse_args()
  if args.memory == 'kept':
    command_line.prepare_backend()
    jax.config.update('jax_enable_compilation_cache', False)
  packages = ['jax', 'jaxlib'] + [
    'torch',
    'vector-quantize-pytorch',
  ] * args.peer
  hardware = (
    f'{provenance.hardware()}, {provenance.versions(*packages)}, '
    f'{args.memory} memory'
  )
  print(hardware)
  results = []
  for size in args.size:
    side, batch = map(int, size.split(':'))
    records = measure(side, batch, args)
    results.append({'side': side, 'batch': batch, 'forms': records})
    print('\n'.join(report(side, batch, records)), flush=True)
  if args.json:
    record = {'hardware': hardware, 'results': results}
    args.json.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  main()
