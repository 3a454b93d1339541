"""Time and memory of the quantizer beside its alternatives.

  python benchmarks/quantizer.py [--peer] [--choices] [--repeats=N]

The forms alternate in one process on two cores; medians and ratios are printed
as Markdown. A full step is forward and backward of: search, rotation,
commitment loss, EMA update of the codebook. `--peer` adds the step of
vector-quantize-pytorch (`pip install torch vector-quantize-pytorch`), and
`--choices` the step with every estimator and with dead codes replaced by either
rule of splitting.
"""

import functools
import os
import statistics
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.quantize.codebook import Codebook, ema_update
from rvq_jax.quantize.gradients import ESTIMATORS, rotate
from rvq_jax.quantize.replacement import replace_codes
from rvq_jax.quantize.search import nearest_codes, tile_sizes

SIZES = ((2048, 16384, 256), (16384, 8192, 64), (16384, 16384, 256))  # N, K, D
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

  A lower bound on the time of any exact search by these scores.
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
  """vector-quantize-pytorch's step, with a codebook that it makes."""
  torch, layer = common.make_peer(dim, k, threshold_ema_dead_code=0)
  layer.train()
  e = torch.tensor(np.asarray(e))[None].requires_grad_()
  gradient = torch.tensor(np.asarray(gradient))[None]

  def step():
    e.grad = None
    quantized, _, loss = layer(e)
    (torch.sum(quantized * gradient) + loss.sum()).backward()
    if e.is_cuda:
      torch.cuda.synchronize()

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
    result[name] = functools.partial(compiled, *args), temp
  return result


def peak_memory(call):
  """Bytes by which the resident set grew at most during a call, or None."""
  try:
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
  except OSError:
    return None
  before = common.resident()
  call()
  return max(0, common.resident(field='VmHWM') - before)


def measure(n, k, dim, names, repeats):
  """One record per form: ms of each turn, XLA temporaries and peak memory."""
  records, calls = {}, {}
  for name, (call, temp) in forms(n, k, dim, names).items():
    calls[name] = call
    peak = peak_memory(lambda call=call: jax.block_until_ready(call()))
    records[name] = {'xla_temp_bytes': temp, 'peak_bytes': peak}
  for name, times in common.measure(calls, repeats, pause=0.1).items():
    records[name] |= {'ms': statistics.median(times), 'least': min(times)}
  return records


def table(records):
  """A Markdown table of one size: times, ratios, memory."""

  def mib(size):
    return '' if size is None else f'{size / 2**20:.0f}'

  columns = 'ms', 'least', '/ matmul', '/ peer', 'XLA temp MiB', 'peak MiB'
  yield common.header('form', *columns)
  for name, record in records.items():
    ms = record['ms']
    yield common.row(
      *(name, f'{ms:.1f}', f'{record["least"]:.1f}'),
      f'{ms / records[MATMUL]["ms"]:.3f}',
      f'{ms / records[PEER]["ms"]:.4f}' if PEER in records else '',
      *(mib(record['xla_temp_bytes']), mib(record['peak_bytes'])),
    )


def main():
  """Parses the command line, measures and prints."""
  args = common.parser(
    __doc__, peer=False, choices=False, repeats=7
  ).parse_args()
  common.use_cores()
  if args.peer:
    common.make_peer(2, 2)  # ends here if it is not there
  names = [OURS, SEARCH, TEXTBOOK, MATMUL, TILES, HALF] + [PEER] * args.peer
  if args.choices:
    names = [OURS, SEARCH, MATMUL, *CHOICES]
  packages = ['jax', 'jaxlib', *common.PEERS * args.peer]
  load = f'{common.cores()} used, load {os.getloadavg()[0]:.1f}'
  print(f'{common.hardware()}, {load}, {common.versions(*packages)}')
  for n, k, dim in SIZES:
    records = measure(n, k, dim, names, args.repeats)
    print(f'\nN {n}, K {k}, D {dim}\n', *table(records), sep='\n', flush=True)


if __name__ == '__main__':
  main()
