"""Time and memory of the quantizer beside what else there is.

  python benchmarks/quantizer.py [--peer] [--sweep] [--choices] [--repeats N]
    [--json FILE]

The forms alternate in one process on two cores; medians and ratios are printed
as Markdown. A full step is forward and backward of: search, rotation,
commitment loss, EMA update of the codebook. `--peer` adds that of
vector-quantize-pytorch (`pip install torch vector-quantize-pytorch`),
`--sweep` shows the cost over K = 2^10 ... 2^18, and `--choices` that of every
estimator and of replacing dead codes by either rule of splitting.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from importlib.metadata import version

CORES = 2
# Before JAX and torch count the cores; whoever imports this keeps all.
if __name__ == '__main__' and hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from rvq_jax.quantize.codebook import Codebook, ema_update  # noqa: E402
from rvq_jax.quantize.estimators import ESTIMATORS  # noqa: E402
from rvq_jax.quantize.gradients import rotate  # noqa: E402
from rvq_jax.quantize.replacement import replace_codes  # noqa: E402
from rvq_jax.quantize.search import nearest_codes, tile_sizes  # noqa: E402

# (N, K, D) and the greatest time of our step as a share of the peer's.
SIZES = {
  (2048, 16384, 256): 0.05,
  (16384, 8192, 64): 0.03,
  (16384, 16384, 256): 0.035,
}
SEARCH_TARGET = 0.75  # of the matmul
TEMP_TARGET = 64  # MiB of XLA temporaries
PAUSE = 0.1  # seconds before each call: the last one's threads still spin
OURS, SEARCH, TEXTBOOK, MATMUL, TILES, HALF, PEER = (
  'rvq_jax, full step',
  'rvq_jax, search alone',
  'textbook, full step',
  'one N x K matmul',
  'its multiply-adds in our tiles, no maximum',
  'the same in bfloat16',
  'vector-quantize-pytorch, full step',
)
# Form -> arguments of `our_step`, which by itself is the rotation.
CHOICES = {
  f'full step, {name}': {'estimator': name}
  for name in ESTIMATORS
  if name != 'rotation'
} | {
  f'full step, dead codes split by {name}': {'split_by': name}
  for name in ('count', 'distortion')
}


def our_step(e, gradient, codebook, *, estimator='rotation', split_by=None):
  """Gradient of the encoder outputs and the codebook after the step."""
  n, k = e.shape[0], codebook.cluster_size.shape[0]

  def loss(e):
    ids = nearest_codes(e, codebook.embedding)
    q = jnp.take(codebook.embedding, ids, axis=0)
    commitment = 0.25 * jnp.mean((e - jax.lax.stop_gradient(q)) ** 2)
    quantized = ESTIMATORS[estimator](
      e, q, ids=ids, num_codes=k, max_scale=10.0
    )
    return jnp.sum(quantized * gradient) + commitment, ids

  grad, ids = jax.grad(loss, has_aux=True)(e)
  codebook = ema_update(codebook, e, ids, decay=0.99, eps=1e-5)
  if split_by:
    dead = codebook.cluster_size < 0.9 * n / k
    key = jax.random.key(0)
    codebook, _ = replace_codes(
      *(codebook, dead, key, e, ids), expected_size=n / k, split_by=split_by
    )
  return grad, codebook


def textbook_step(e, gradient, codebook):
  """The same step by the whole matrix of distances and a one-hot matrix."""
  codes = codebook.embedding
  squares = jnp.sum(e**2, axis=1)[:, None] + jnp.sum(codes**2, axis=1)[None]
  ids = jnp.argmin(squares - 2 * e @ codes.T, axis=1)
  chosen = jax.nn.one_hot(ids, codes.shape[0])

  def loss(e):
    q = chosen @ codes
    return jnp.sum(rotate(e, q) * gradient) + 0.25 * jnp.mean((e - q) ** 2)

  size = 0.99 * codebook.cluster_size + 0.01 * jnp.sum(chosen, axis=0)
  sums = 0.99 * codebook.embedding_sum + 0.01 * chosen.T @ e
  total = jnp.sum(size)
  smoothed = (size + 1e-5) / (total + codes.shape[0] * 1e-5) * total
  return jax.grad(loss)(e), Codebook(sums / smoothed[:, None], size, sums)


def tiled_products(e, codes, dtype):
  """The scores of `nearest_codes` in its tiles; only their first row is kept.

  What no exact search by these scores can be faster than.
  """
  (n, dim), k = e.shape, codes.shape[0]
  rows, width = tile_sizes(n, k, 'cpu')
  tiles = codes.astype(dtype).reshape(k // width, width, dim)

  def block(_, x):
    def visit(i, total):
      score = jax.lax.dot_general(
        tiles[i],
        x.astype(dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      return total + score[0]

    return None, jax.lax.fori_loop(0, k // width, visit, jnp.zeros(rows))

  return jax.lax.scan(block, None, e.reshape(n // rows, rows, dim))[1]


def peer_step(n, k, dim, e, gradient):
  """vector-quantize-pytorch's step; its codebook is its own."""
  try:
    import torch
    from vector_quantize_pytorch import VectorQuantize
  except ImportError as error:
    sys.exit(f'--peer needs torch and vector-quantize-pytorch: {error}')
  torch.set_num_threads(CORES)
  layer = VectorQuantize(
    dim=dim,
    codebook_size=k,
    decay=0.99,
    commitment_weight=0.25,
    rotation_trick=True,
    kmeans_init=False,
    threshold_ema_dead_code=0,
  ).train()
  e = torch.tensor(np.asarray(e))[None].requires_grad_()
  gradient = torch.tensor(np.asarray(gradient))[None]

  def step():
    e.grad = None
    quantized, _, loss = layer(e)
    (torch.sum(quantized * gradient) + loss.sum()).backward()

  return step


def forms(n, k, dim, names):
  """name -> (call without arguments, bytes of XLA temporaries or None)."""
  keys = jax.random.split(jax.random.key(0), 3)
  e, gradient = (jax.random.normal(key, (n, dim)) for key in keys[:2])
  embedding = jax.random.normal(keys[2], (k, dim))
  codebook = Codebook(embedding, jnp.full(k, n / k), embedding * (n / k))
  jitted = {
    OURS: (our_step, (e, gradient, codebook)),
    SEARCH: (lambda e, c: nearest_codes(e, c), (e, embedding)),
    TEXTBOOK: (textbook_step, (e, gradient, codebook)),
    MATMUL: (lambda e, c: e @ c.T, (e, embedding)),
    TILES: (lambda e, c: tiled_products(e, c, jnp.float32), (e, embedding)),
    HALF: (lambda e, c: tiled_products(e, c, jnp.bfloat16), (e, embedding)),
  }
  for name, choice in CHOICES.items():
    step = functools.partial(our_step, **choice)
    jitted[name] = step, (e, gradient, codebook)
  result = {}
  for name in names:
    if name == PEER:
      result[name] = peer_step(n, k, dim, e, gradient), None
      continue
    function, args = jitted[name]
    compiled = jax.jit(function).lower(*args).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    # The default arguments keep this form's function and arrays.
    result[name] = (
      lambda run=compiled, args=args: jax.block_until_ready(run(*args)),
      temp,
    )
  return result


def resident(field):
  """VmRSS or VmHWM of this process in bytes; 0 where there is no /proc."""
  try:
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  except OSError:
    return 0
  values = [line.split()[1] for line in lines if line.startswith(field)]
  return int(values[0]) * 1024 if values else 0


def peak_memory(call):
  """Bytes by which the resident set grew at most during a call, or None."""
  try:
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
  except OSError:
    return None
  before = resident('VmRSS')
  call()
  return max(0, resident('VmHWM') - before)


def measure(n, k, dim, names, repeats):
  """One record per form: median ms, XLA temporaries and peak memory."""
  calls = forms(n, k, dim, names)
  times = {name: [] for name in calls}
  peaks = {name: peak_memory(call) for name, (call, _) in calls.items()}
  for _ in range(repeats):
    for name, (call, _) in calls.items():
      time.sleep(PAUSE)
      start = time.perf_counter()
      call()
      times[name].append(1e3 * (time.perf_counter() - start))
  return {
    name: {
      'ms': statistics.median(times[name]),
      'all_ms': times[name],
      'xla_temp_bytes': temp,
      'peak_bytes': peaks[name],
    }
    for name, (_, temp) in calls.items()
  }


def table(records):
  """A Markdown table of one size: times, ratios, memory."""

  def mib(size):
    return '' if size is None else f'{size / 2**20:.0f}'

  peer = records.get(PEER, {}).get('ms')
  yield '| form | ms | least | / matmul | / peer | XLA temp MiB | peak MiB |'
  yield '|---|---|---|---|---|---|---|'
  for name, row in records.items():
    share = f'{row["ms"] / peer:.4f}' if peer else ''
    yield (
      f'| {name} | {row["ms"]:.1f} | {min(row["all_ms"]):.1f} '
      f'| {row["ms"] / records[MATMUL]["ms"]:.3f} | {share} '
      f'| {mib(row["xla_temp_bytes"])} | {mib(row["peak_bytes"])} |'
    )


def verdicts(size, records):
  """One line per target of this size: what it is and whether it is met."""
  ratio = records[SEARCH]['ms'] / records[MATMUL]['ms']
  rows = [('search / matmul', ratio, SEARCH_TARGET)]
  for name in (SEARCH, OURS):
    temp = records[name]['xla_temp_bytes'] / 2**20
    rows.append((f'{name}: XLA temporaries in MiB', temp, TEMP_TARGET))
  if PEER in records:
    ratio = records[OURS]['ms'] / records[PEER]['ms']
    rows.append(('full step / peer', ratio, SIZES[size]))
  for what, value, target in rows:
    met = 'met' if value <= target else 'NOT met'
    yield f'- {what}: {value:.4g}, target {target:g}: {met}'


def hardware(peer):
  """One line: processor, cores, versions."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  cpus = [line.split(': ')[1] for line in lines if 'model name' in line]
  cpu = (cpus or [platform.processor()])[0]
  packages = ['jax', 'jaxlib'] + ['torch', 'vector-quantize-pytorch'] * peer
  load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan')
  versions = ', '.join(f'{name} {version(name)}' for name in packages)
  return f'{CORES} cores of {cpu}, load {load:.1f}, {versions}'


def main():
  """Parses the command line, measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for flag in ('--peer', '--sweep', '--choices'):
    parser.add_argument(flag, action='store_true')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  names = [OURS, SEARCH, TEXTBOOK, MATMUL, TILES, HALF] + [PEER] * args.peer
  sizes = list(SIZES)
  if args.choices:
    names = [OURS, SEARCH, MATMUL, *CHOICES]
  if args.sweep:
    sizes = [(1024, 2**power, 64) for power in range(10, 19)]
    names = [name for name in names if name not in (TEXTBOOK, TILES, HALF)]
  if args.peer:
    peer_step(1, 2, 2, np.zeros((1, 2)), np.zeros((1, 2)))  # is it there?
  print(hardware(args.peer))
  results = []
  for n, k, dim in sizes:
    records = measure(n, k, dim, names, args.repeats)
    results.append({'n': n, 'k': k, 'dim': dim, 'forms': records})
    print(f'\nN {n}, K {k}, D {dim}\n', *table(records), sep='\n')
    if not args.sweep:
      print('', *verdicts((n, k, dim), records), sep='\n', flush=True)
  if args.json:
    report = {'hardware': hardware(args.peer), 'results': results}
    args.json.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
  main()
