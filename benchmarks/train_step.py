"""Time of one training step of the paper's model, beside PyTorch's.

  python benchmarks/train_step.py [--peer] [--repeats=N] [--size 32:128 ...]
    [--dtype=float32|bfloat16] [--memory=default|kept]

The model of configs/cifar10.py (f8, D = 256, six residual blocks, K = 16384) at
32x32 with 128 images a step and at 256x256 with 8, on two cores. Forms
alternate in one process; printed are medians, ratios, compile time, memory and,
by XLA's count, operations per second. `--peer` adds the same model
in PyTorch (torch_model.py) with vector-quantize-pytorch's quantizer and with
one as good as ours (`pip install torch vector-quantize-pytorch`).
`--memory=kept` has the C library keep freed memory, for every form, as our
launchers do.
"""

import statistics

import common
import jax

from rvq_jax.evaluation import speed

OURS, PEER, TUNED = (
  'rvq_jax',
  'torch, vector-quantize-pytorch',
  'torch, a quantizer as good as ours',
)


def torch_step(side, batch, name, dtype='float32'):
  """A call that trains one step of the model in PyTorch."""
  torch = common.import_torch()
  import torch_model

  torch.manual_seed(0)
  device = torch.get_default_device().type
  gpu = device == 'cuda'
  if name == TUNED:
    rows = 16384 if gpu else 1024
    quantizer = torch_model.TiledQuantizer(16384, 256, rows=rows)
  else:
    _, quantizer = common.make_peer(256, 16384, threshold_ema_dead_code=2)
  layout = torch.channels_last if gpu else torch.preserve_format
  model = torch_model.Model(quantizer).train().to(memory_format=layout)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=2e-4, weight_decay=0.01, fused=gpu
  )
  images = torch.rand(batch, 3, side, side).to(memory_format=layout) * 2 - 1

  def call():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, dtype == 'bfloat16'):
      reconstruction, loss = model(images)
    (torch.mean((reconstruction.float() - images) ** 2) + loss).backward()
    optimizer.step()
    if gpu:
      torch.cuda.synchronize()

  return call


def measure(side, batch, args):
  """name -> ms (median), least, and the compiler's counts."""
  calls, records = {}, {}
  for name in [OURS] + [PEER, TUNED] * args.peer:
    if name == OURS:
      config = common.load_config('cifar10', 'f8')
      config.data.image_size, config.batch_size = side, batch
      config.model.dtype = args.dtype
      program = speed.train_program(config, jax.devices()[:1])
      memory = program.compiled.memory_analysis().temp_size_in_bytes
      calls[name], records[name] = program.call, {'xla_temp_bytes': memory}
      records[name] |= program.about
    else:
      calls[name], records[name] = torch_step(side, batch, name), {}
  for name, times in common.measure(calls, args.repeats, pause=0.1).items():
    records[name] |= {'ms': statistics.median(times), 'least': min(times)}
  return records


def report(side, batch, records):
  """A Markdown table of one size."""
  yield f'\n{side}x{side}, batch {batch}\n'
  yield common.header('form', 'ms', 'least', 'ours / it', 'images/s')
  ours = records[OURS]
  for name, record in records.items():
    ms = record['ms']
    yield common.row(
      *(name, f'{ms:.0f}', f'{record["least"]:.0f}'),
      *(f'{ours["ms"] / ms:.3f}', f'{1e3 * batch / ms:.1f}'),
    )
  gflop = 1e3 * ours['TFLOP']
  yield (
    f'\ncompile {ours["compile_s"]:.1f} s, {gflop:.0f} GFLOP a step, '
    f'{1e3 * gflop / ours["ms"]:.0f} GFLOP/s, XLA temporaries '
    f'{ours["xla_temp_bytes"] / 2**20:.0f} MiB'
  )


def main():
  """Parses the command line, measures and prints."""
  args = common.parser(
    __doc__,
    peer=False,
    repeats=5,
    dtype=('float32', 'bfloat16'),
    memory=('default', 'kept'),
    size=['32:128', '256:8'],
  ).parse_args()
  common.use_cores()
  if args.memory == 'kept':
    common.prepare_backend()
    jax.config.update('jax_enable_compilation_cache', False)
  packages = ['jax', 'jaxlib', *common.PEERS * args.peer]
  versions = common.versions(*packages)
  print(f'{common.hardware()}, {versions}, {args.memory} memory')
  for size in args.size:
    side, batch = map(int, size.split(':'))
    records = measure(side, batch, args)
    print('\n'.join(report(side, batch, records)), flush=True)


if __name__ == '__main__':
  main()
