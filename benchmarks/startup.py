"""Seconds until a program is useful, and the processor time until then.

python benchmarks/startup.py [--repeats=5] [--config=configs/photos.py]

  jax, flax    import jax, flax.linen
  layer        from rvq_jax import VectorQuantizer
  cold         launch/main.py to the log of its first step, nothing cached
  cached       the same with the programs that `cold` compiled

Each is a separate process. Rows take turns; printed are medians.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import common


def run(*arguments, until='', **environment) -> tuple[float, float]:
  """Wall and processor seconds of a program, or until a line of its log."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=common.ROOT,
    env=os.environ | {'PYTHONPATH': str(common.ROOT)} | environment,
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


def measure(config) -> dict[str, tuple[float, float]]:
  """One run of each row."""
  seconds = {
    'jax, flax': run('-c', 'import jax, flax.linen'),
    'layer': run('-c', 'from rvq_jax import VectorQuantizer'),
  }
  with tempfile.TemporaryDirectory() as folder:
    for name in ('cold', 'cached'):
      seconds[name] = run(
        *('launch/main.py', f'--config={config}', '--config.log_every=1'),
        f'--workdir={folder}/{name}',
        until='step 1/',
        XDG_CACHE_HOME=f'{folder}/cache',
      )
  return seconds


def main() -> None:
  """Measures and prints."""
  parser = common.parser(__doc__, repeats=5, config='configs/photos.py')
  options = parser.parse_args()
  turns = [measure(options.config) for _ in range(options.repeats)]
  print(f'{options.config}, {common.cores()} cores')
  print(f'{"":<12}{"seconds":>9}{"of processor":>14}')
  for name in turns[0]:
    times = zip(*(x[name] for x in turns), strict=True)
    wall, used = map(statistics.median, times)
    print(f'{name:<12}{wall:>9.2f}{used:>14.2f}')


if __name__ == '__main__':
  main()
