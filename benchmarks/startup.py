"""Seconds until a program is useful, and the processor time until then.

python benchmarks/startup.py [--repeats=5] [--config=configs/photos.py]
  [--checkout=DIR ...]

  jax, flax    import jax, flax.linen
  layer        from rvq_jax import VectorQuantizer
  cold         launch/main.py to the log of its first step, nothing cached
  cached       the same with the programs that `cold` compiled

Each is a separate process. Rows take turns, and so do the checkouts to be
compared (default: this one); printed are medians.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common


def run(checkout, *arguments, until='', **environment) -> tuple[float, float]:
  """Wall and processor seconds of a program, or until a line of its log."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=checkout,
    env=os.environ | {'PYTHONPATH': str(checkout)} | environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  log = []
  for line in process.stderr:
    log.append(line)
    if until and until in line:
      process.kill()
      break
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - start
  if until not in ''.join(log) or (not until and status):
    raise RuntimeError(''.join(log))
  return seconds, usage.ru_utime + usage.ru_stime


def measure(checkout, config) -> dict[str, tuple[float, float]]:
  """One run of each row."""
  seconds = {
    'jax, flax': run(checkout, '-c', 'import jax, flax.linen'),
    'layer': run(checkout, '-c', 'from rvq_jax import VectorQuantizer'),
  }
  with tempfile.TemporaryDirectory() as folder:
    for name in ('cold', 'cached'):
      seconds[name] = run(
        checkout,
        *('launch/main.py', f'--config={config}', '--config.log_every=1'),
        f'--workdir={folder}/{name}',
        until='step 1/',
        XDG_CACHE_HOME=f'{folder}/cache',
      )
  return seconds


def main() -> None:
  """Measures and prints."""
  parser = common.parser(__doc__, repeats=5, config='configs/photos.py')
  parser.add_argument('--checkout', type=Path, nargs='+', default=[common.ROOT])
  options = parser.parse_args()
  calls = {
    checkout: functools.partial(measure, checkout.resolve(), options.config)
    for checkout in options.checkout
  }
  print(f'{options.config}, {common.cores()} cores')
  for checkout, turns in common.in_turn(calls, options.repeats).items():
    print(f'{checkout}\n{"":<12}{"seconds":>9}{"of processor":>14}')
    for name in turns[0]:
      wall, used = map(
        statistics.median, zip(*(x[name] for x in turns), strict=True)
      )
      print(f'{name:<12}{wall:>9.2f}{used:>14.2f}')


if __name__ == '__main__':
  main()
