"""What each part of a training step costs, against batch, resolution and K.

python benchmarks/step_parts.py [--size 32:32 32:128 64:32 128:8 256:2 256:8]
  [--codes 1024 16384 131072] [--repeats 5] [--memory kept|default]

The parts of the paper's model (f8, D = 256, twelve residual blocks, eight
heads), each compiled alone in float32 and timed in turn, forward and backward
where there is a backward pass: medians, multiply-adds forward by the formulas
of docs/scale.md, and GFLOP/s (two operations a multiply-add, three passes with
a backward pass). The search and the moving average also against --codes at the
second size.
"""

import statistics

import common
import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.encoder import Encoder
from rvq_jax.models.layers import (
  Norm,
  ResidualBlock,
  SelfAttention,
  Upsample,
)
from rvq_jax.quantize.codebook import Codebook, ema_update
from rvq_jax.quantize.search import nearest_codes

_DIM, _FACTOR, _BLOCKS, _CODES = 256, 8, 12, 16384


class _Ups(nn.Module):
  """The transposed convolutions of the decoder with their norms."""

  @nn.compact
  def __call__(self, x):
    for i, features in enumerate((128, 64)):
      x = Upsample(features, name=f'up{i}')(x)
      x = nn.leaky_relu(Norm(name=f'norm{i}')(x, train=True))
    return jnp.tanh(Upsample(3, name='up2')(x))


def _trained(module, x, *args, **kwargs):
  """A call that takes the gradient of a module, for its inputs too."""
  variables = module.init(jax.random.key(0), x, *args, **kwargs)

  @jax.jit
  def step(variables, x):
    def loss(params, x):
      y = module.apply(
        variables | {'params': params},
        x,
        *args,
        **kwargs,
        mutable=['batch_stats'],
      )[0]
      return jnp.mean(y * y)

    return jax.grad(loss, argnums=(0, 1))(variables['params'], x)

  return lambda: jax.block_until_ready(step(variables, x))


def model_parts(side: int, batch: int):
  """name -> (call, times it is in a step, multiply-adds forward of a call)."""
  grid = side // _FACTOR
  n = batch * grid * grid
  images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
  z = jax.random.normal(jax.random.key(1), (batch, grid, grid, _DIM))
  return {
    'residual blocks': (
      _trained(ResidualBlock(), z, True),
      _BLOCKS,
      2 * n * 9 * _DIM**2,
    ),
    'strided convolutions': (
      _trained(Encoder(num_res_blocks=0), images, train=True),
      1,
      n * (27_648 + 4 * 73_728 + 294_912 + _DIM**2),
    ),
    'transposed convolutions': (
      _trained(_Ups(), z),
      1,
      n * 16 * (32_768 + 4 * 8_192 + 16 * 192),
    ),
    'attention': (
      _trained(SelfAttention(8), z),
      1,
      n * (4 * _DIM**2 + 2 * grid * grid * _DIM),
    ),
  }


def quantizer_parts(n: int, codes: int):
  """The search and the moving average, which have no backward pass."""
  e = jax.random.normal(jax.random.key(0), (n, _DIM))
  book = Codebook.create(
    jax.random.normal(jax.random.key(1), (codes, _DIM)), n / codes
  )
  ids = nearest_codes(e, book.embedding)
  move = jax.jit(
    lambda book, e, ids: ema_update(book, e, ids, decay=0.99),
    donate_argnums=0,
  )

  def update():
    nonlocal book
    book = jax.block_until_ready(move(book, e, ids))

  search = jax.jit(nearest_codes)
  embedding = book.embedding + 0  # the update takes the other one
  return {
    'search': (
      lambda: jax.block_until_ready(search(e, embedding)),
      1,
      n * codes * _DIM,
    ),
    'moving average': (update, 1, n * _DIM),
  }


def measure(parts, repeats: int):
  """Medians in ms of the parts of one step, by name, the calls in turn."""
  times = common.measure({n: call for n, (call, *_) in parts.items()}, repeats)
  return {
    name: parts[name][1] * statistics.median(x) for name, x in times.items()
  }


def rows(label: str, parts, medians):
  """Lines of a Markdown table."""
  for name, ms in medians.items():
    _, times, adds = parts[name]
    passes = 1 if name in ('search', 'moving average') else 3
    rate = 2 * passes * times * adds / ms / 1e6
    adds = f'{times * adds / 1e9:.3g}'
    yield common.row(label, name, adds, f'{ms:.1f}', f'{rate:.0f}')


def main():
  """Measures and prints."""
  args = common.parser(
    __doc__,
    size=['32:32', '32:128', '64:32', '128:8', '256:2', '256:8'],
    codes=[1024, 16384, 131072],
    repeats=5,
    memory=('kept', 'default'),
  ).parse_args()
  if args.memory == 'kept':
    common.prepare_backend()
  print(f'{common.hardware()}, {common.versions("jax", "jaxlib")}')
  columns = 'part', 'multiply-adds forward, 10^9', 'ms a step', 'GFLOP/s'
  print(common.header('', *columns))
  tokens = []
  for size in args.size:
    side, batch = map(int, size.split(':'))
    tokens.append(batch * (side // _FACTOR) ** 2)
    parts = model_parts(side, batch) | quantizer_parts(tokens[-1], _CODES)
    medians = measure(parts, args.repeats)
    label = f'{side}x{side}, batch {batch}'
    print('\n'.join(rows(label, parts, medians)), flush=True)
    print(f'| {label} | sum | | {sum(medians.values()):.0f} | |', flush=True)
  n = tokens[min(1, len(tokens) - 1)]
  for codes in args.codes:
    parts = quantizer_parts(n, codes)
    label = f'N {n}, K {codes}'
    print('\n'.join(rows(label, parts, measure(parts, args.repeats))))


if __name__ == '__main__':
  main()
