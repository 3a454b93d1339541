"""Encoding and decoding speed of runs or exports, side by side.

python benchmarks/tokenizers.py RUN ... [--images=64] [--repeats=9]

Each is given as many random images of the side that it was trained on. The
models take turns, in one process; medians, and the ratio to the first RUN in
the same turn.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from rvq_jax import load
from rvq_jax.paper import report as provenance


def measure(tokenizers, images, repeats):
  """Seconds of each turn: {'encode' or 'decode': [turns, tokenizers]}."""
  calls = {'encode': [], 'decode': []}
  for tokenizer in tokenizers:
    side = tokenizer.config['data.image_size']
    pixels = np.random.default_rng(0).integers(
      0, 256, (images, side, side, 3), np.uint8
    )
    ids = tokenizer.encode(pixels)
    calls['encode'].append((tokenizer.encode, pixels))
    calls['decode'].append((tokenizer.decode, ids))
  seconds = {}
  for name, parts in calls.items():
    turns = []
    for turn in range(repeats + 1):  # the first one compiles
      own = []
      for call, argument in parts:
        start = time.perf_counter()
        jax.block_until_ready(call(argument))
        own.append(time.perf_counter() - start)
      if turn:
        turns.append(own)
    seconds[name] = turns
  return seconds


def main():
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=9)
  args = parser.parse_args()
  tokenizers = [load(run) for run in args.runs]
  seconds = measure(tokenizers, args.images, args.repeats)
  print(provenance.hardware())
  print(
    '| run | tokens | encode, images/s | ratio | decode, images/s | ratio |'
  )
  print('|---|---|---|---|---|---|')
  for i, (run, tokenizer) in enumerate(zip(args.runs, tokenizers, strict=True)):
    side = tokenizer.config['data.image_size']
    row = [run, str(int(np.prod(tokenizer.ids_shape(side, side))))]
    for turns in seconds.values():
      row.append(f'{args.images / statistics.median(t[i] for t in turns):.1f}')
      row.append(f'{statistics.median(t[0] / t[i] for t in turns):.2f}')
    print(f'| {" | ".join(row)} |')


if __name__ == '__main__':
  main()
