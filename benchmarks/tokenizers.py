"""Encoding and decoding speed of runs or exports, side by side.

python benchmarks/tokenizers.py RUN ... [--images=64] [--repeats=9]

Each is given as many random images of the side that it was trained on. Models
take turns in one process; medians, and the ratio to the first in the same turn.
"""

import functools
import statistics

import common
import numpy as np

from rvq_jax import load


def main():
  """Prints a table."""
  parser = common.parser(__doc__, images=64, repeats=9)
  parser.add_argument('runs', nargs='+', metavar='RUN')
  args = parser.parse_args()
  tokenizers = [load(run) for run in args.runs]
  calls = {'encode': {}, 'decode': {}}
  for i, tokenizer in enumerate(tokenizers):
    side = tokenizer.config['data.image_size']
    shape = args.images, side, side, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ids = tokenizer.encode(pixels)
    calls['encode'][i] = functools.partial(tokenizer.encode, pixels)
    calls['decode'][i] = functools.partial(tokenizer.decode, ids)
  times = {name: common.measure(x, args.repeats) for name, x in calls.items()}
  print(common.hardware())
  columns = 'encode, images/s', 'ratio', 'decode, images/s', 'ratio'
  print(common.header('run', 'tokens', *columns))
  for i, (run, tokenizer) in enumerate(zip(args.runs, tokenizers, strict=True)):
    side = tokenizer.config['data.image_size']
    row = [run, int(np.prod(tokenizer.ids_shape(side, side)))]
    for turns in times.values():
      row.append(f'{1e3 * args.images / statistics.median(turns[i]):.1f}')
      row.append(f'{common.ratio(turns[0], turns[i]):.2f}')
    print(common.row(*row))


if __name__ == '__main__':
  main()
