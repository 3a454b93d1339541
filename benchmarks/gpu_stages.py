"""The stages of gpu.py that are no ordinary runs; each is a process.

  python benchmarks/gpu_stages.py edges|resume|quantizer|step|encode
    --output=FILE.json [--profile=DIR] [--rehearse]

The JSON holds `hardware` and `rows`, a table. Times are medians. docs/scale.md
has the formulas of the FLOPs. A share of peak refers to NVIDIA's dense peak:
989 TFLOP/s in bfloat16, 67 in float32, for both H100 and H200.
"""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import train_step
from quantizer import our_step

from rvq_jax.quantize.codebook import Codebook
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.search import nearest_codes
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.loop import train

PEAK = {'bfloat16': 989e12, 'float32': 67e12}


def median_ms(call) -> float:
  """Median time of five calls, after one that compiles."""
  return statistics.median(common.measure({'': call}, 5)[''])


def edges(args) -> list[dict]:
  """Search and gradients on hard inputs, against float64 on the host."""
  rng = np.random.default_rng(0)
  n, k, dim = (256, 300, 16) if args.rehearse else (8192, 16384, 256)
  rows = []
  inputs = ('unit', 1, 0), ('offset 100', 1, 100)
  inputs += ('1e-6', 1e-6, 0), ('1e6', 1e6, 0)
  for name, scale, offset in inputs:
    e, codes = (
      np.float32(scale * (rng.normal(size=(m, dim)) + offset)) for m in (n, k)
    )
    ids = np.asarray(nearest_codes(e, codes))
    x, y = (a.astype(np.float64) for a in (e, codes))
    squares = np.sum(y**2, axis=1)
    best = np.full(n, np.inf)
    for i in range(0, k, 1024):
      part = squares[i : i + 1024] - 2 * x @ y[i : i + 1024].T
      best = np.minimum(best, part.min(axis=1))
    best += np.sum(x**2, axis=1)
    got = np.sum((x - y[ids]) ** 2, axis=1)
    rows.append(
      {
        'check': f'search, {name}: not the nearest; excess of the distance',
        'vectors': n,
        'wrong': int(np.sum(got > best * (1 + 1e-12))),
        'greatest': float(np.max(got / best - 1)),
        # float32 cannot tell distances apart that differ by less.
        'sound': bool(np.max(got / best - 1) < 1e-5),
      }
    )
  for name in ESTIMATORS:
    rows.append(edge_gradients(name))
  return rows


def edge_gradients(name: str) -> dict:
  """The gradient of an estimator for norms from 0 to 1e6 and all angles."""
  rng = np.random.default_rng(1)
  unit = rng.normal(size=(2, 4096, 8))
  unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
  unit[1, :512] = -unit[0, :512] + 1e-7 * unit[1, :512]
  norms = np.concatenate([[0], np.logspace(-30, 6, 63)])
  e, q = np.float32(unit * rng.choice(norms, size=(2, 4096, 1)))
  g = np.float32(rng.normal(size=e.shape))

  def loss(e):
    codes = {'ids': jnp.arange(len(q)), 'num_codes': len(q)}
    quantized = ESTIMATORS[name](e, q, max_scale=10.0, **codes)
    return jnp.sum(quantized * g), quantized

  to_e, quantized = map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(e))
  longest = np.linalg.norm(to_e, axis=1) / np.linalg.norm(g, axis=1)
  wrong = int(np.sum(~np.isfinite(to_e)) + np.sum(quantized != q))
  return {
    'check': f'{name}: not finite or not q; length of dL/de over g',
    'vectors': len(q),
    'wrong': wrong,
    'greatest': float(longest.max()),
    'sound': wrong == 0 and bool(longest.max() < 10.1),
  }


def resume(args) -> list[dict]:
  """Six steps, and six with a stop after three: are they the same bits?"""
  config = common.load_config('photos')
  config.deterministic, config.optimizer.warmup_steps = True, 0
  config.num_steps, config.checkpoint_every, config.eval_every = 6, 3, 0
  config.model.quantize_after = 2
  if args.rehearse:
    config.batch_size, config.model.widths = 4, (8, 16)
    config.model.num_res_blocks, config.model.codebook_size = 0, 64
  folder = Path(tempfile.mkdtemp())
  whole, parts = folder / 'whole', folder / 'parts'
  train(config, whole)
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / 'checkpoints' / '6')
  train(config, parts)
  digests = []
  for workdir in (whole, parts):
    with Checkpoints(workdir, read_only=True) as checkpoints:
      digests.append(checkpoints.meta(6)['digests'])
  shutil.rmtree(folder)
  return [
    {'bit-exact': name, 'sound': digest == digests[1][name]}
    for name, digest in digests[0].items()
  ]


def quantizer(args) -> list[dict]:
  """Our step beside a bfloat16 and a float32 product of N x K."""
  n, dim = (512, 16) if args.rehearse else (131_072, 256)
  sizes = (256, 512) if args.rehearse else [2**p for p in range(14, 19)]
  rows = []
  for k in sizes:
    keys = jax.random.split(jax.random.key(0), 3)
    e, gradient = (jax.random.normal(key, (n, dim)) for key in keys[:2])
    codes = jax.random.normal(keys[2], (k, dim))
    book = Codebook(codes, jnp.full(k, n / k), codes * (n / k))
    step = jax.jit(our_step).lower(e, gradient, book).compile()
    row = {'N': n, 'K': k, 'D': dim}
    row['step, ms'] = median_ms(lambda: step(e, gradient, book))  # noqa: B023
    # N x K numbers do not fit for the largest K: as many rows as 2^31 allow.
    part = min(n, 2**31 // k)
    for dtype in ('bfloat16', 'float32'):
      product = jax.jit(
        lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
      )
      x, y = (a.astype(dtype) for a in (e[:part], codes))
      time_ms = median_ms(lambda: product(x, y))  # noqa: B023
      row[f'{dtype} matmul, ms'] = time_ms * n / part
    row['step / float32 matmul'] = row['step, ms'] / row['float32 matmul, ms']
    row['XLA temporaries, MiB'] = (
      step.memory_analysis().temp_size_in_bytes / 2**20
    )
    rows.append(row)
  return rows


def step(args) -> list[dict]:
  """Train steps of CIFAR-10 and ImageNet, batch 128."""
  rows = []
  for name in 'CIFAR-10', 'ImageNet':
    for dtype in ('float32', 'bfloat16'):
      config = common.load_config(name.lower().replace('-', ''))
      if args.rehearse:
        config.data.image_size, config.batch_size = 32, 2
        config.model.widths = (8, 16, 32)
        config.model.num_res_blocks, config.model.codebook_size = 0, 64
      config.model.dtype = dtype
      about = {'step': f'{name}, f8, {dtype}, batch {config.batch_size}'}
      size = config.data.image_size
      profile = args.profile and f'{args.profile}/{size}_{dtype}'
      rows.append(about | time_step(config, profile))
  return rows


def time_step(config, profile) -> dict:
  """A train step: time, share of peak, memory; a trace of five of them."""
  call, about = train_step.our_step(config, steps=5)
  ms = median_ms(call) / 5
  if profile:
    with jax.profiler.trace(profile):
      call()
  memory = jax.devices()[0].memory_stats() or {}
  peak = PEAK[config.model.dtype]
  return {
    'ms': ms,
    'images/s': 1e3 * config.batch_size / ms,
    'share of peak': about['flops'] / (ms / 1e3) / peak,
    # Of the process: of the largest step so far.
    'peak memory, GB': memory.get('peak_bytes_in_use', 0) / 1e9,
    'compile, s': about['compile_s'],
  }


def encode(args) -> list[dict]:
  """Images/s from uint8 to token ids."""
  size, batch = (32, 4) if args.rehearse else (256, 128)
  config = common.load_config('imagenet')
  config.data.image_size = size
  flat, train_step = common.make_step(config)
  images, model = np.zeros((batch, size, size, 3), np.uint8), train_step.model
  variables = jax.jit(model.init)(jax.random.key(0), images / 127.5 - 1)
  tokenizer = Tokenizer(model, dict(variables), config=flat, step=0)
  ms = median_ms(lambda: tokenizer.encode(images))
  return [{'encode': f'{size} pixels', 'images/s': 1e3 * batch / ms}]


def main():
  """Runs one stage."""
  stages = {f.__name__: f for f in (edges, resume, quantizer, step, encode)}
  parser = common.parser(__doc__, output=str, profile=None, rehearse=False)
  parser.add_argument('stage', choices=stages)
  args = parser.parse_args()
  common.prepare_backend()
  rows = stages[args.stage](args)
  about = f'{common.hardware()}, {common.versions("jax", "flax")}'
  result = {'hardware': about, 'rows': rows}
  Path(args.output).write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
  main()
