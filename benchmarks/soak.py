"""Trains for half an hour while somebody kills it every twenty seconds.

python benchmarks/soak.py [--minutes=30] [--every=20] [--workdir=DIR]
  [--config=configs/photos.py] [--config-flags...]

A run is started, killed with SIGKILL at a random moment, started again, and so
on; then it runs to its end. A second run with the same seed takes as many steps
undisturbed. Prints kills, resumes, steps that were taken twice, items of the
last checkpoint whose digests differ between the two runs, and memory: of the
killed processes at their end, and of the undisturbed one over time. Exit code 1
unless no bit differs and every start succeeds.
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import jax

from rvq_jax import sharding
from rvq_jax.training.build import build_step
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.step import compile_init


def run(command, log: Path, limit: float = math.inf) -> dict:
  """Trains, until the end or a kill after `limit` seconds.

  Returns 'failed' (the end of its log, or ''), 'start' and 'end' (steps; start
  is None before the first one) and 'megabytes' (resident, over time).
  """
  megabytes, end = [], time.monotonic() + limit
  with log.open('w') as stream:
    process = subprocess.Popen(
      command,
      cwd=common.ROOT,
      stdout=subprocess.DEVNULL,
      stderr=stream,
      start_new_session=True,
    )
    while process.poll() is None and time.monotonic() < end:
      megabytes.append(common.resident(process.pid) / 1e6)
      time.sleep(0.1)
    code = process.poll()
    with contextlib.suppress(ProcessLookupError):  # with all that it started
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  text = log.read_text()
  started = re.search(r'; step (\d+) of \d+; ', text)
  steps = re.findall(r' step (\d+)/', text)
  start = int(started[1]) if started else None
  early = limit < math.inf and code is not None
  return {
    'failed': text[-500:] if code or early else '',
    'start': start,
    'end': int(steps[-1]) if steps else start,
    'megabytes': megabytes,
  }


def digest(workdir: Path) -> dict[str, str]:
  """The digests of the newest checkpoint, which is read to check them."""
  flat = json.loads((workdir / 'config.json').read_text())
  sizes = flat['data.image_size'], flat['batch_size']
  train_step = build_step(flat, flat['num_steps'])
  init = compile_init(train_step, sharding.data_mesh(), *sizes)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.resolve()
    checkpoints.restore(init.eval_shape(jax.random.key(0)), step)
    return {'step': str(step)} | checkpoints.meta(step)['digests']


def halves(values: list[float]) -> list[float]:
  """The largest of the first and of the second half."""
  half = len(values) // 2
  return [max(part, default=0) for part in (values[:half], values[half:])]


def soak(options, flags, workdir: Path) -> dict:
  """Kills and resumes until the time is up; the record of it."""
  command = [sys.executable, 'launch/main.py', f'--config={options.config}']
  command += ['--config.log_every=1', *flags]
  rng, log = random.Random(options.seed), workdir / 'log.txt'
  killed, peace = workdir / 'killed', workdir / 'peace'
  runs, end = [], time.monotonic() + 60 * options.minutes
  endless = [*command, f'--workdir={killed}', '--config.num_steps=1000000']
  while time.monotonic() < end:
    runs.append(run(endless, log, rng.uniform(0.25, 1.75) * options.every))
    start, reached = runs[-1]['start'], runs[-1]['end']
    print(f'kill {len(runs)}: from step {start} to {reached}', flush=True)
    if runs[-1]['failed']:
      sys.exit(runs[-1]['failed'])
  trained = [x for x in runs if x['start'] is not None]
  last = max((x['end'] for x in trained), default=0) + 20
  print(f'undisturbed up to step {last}')
  for folder in (killed, peace):
    flags = [f'--workdir={folder}', f'--config.num_steps={last}']
    whole = run([*command, *flags], log)
    if whole['failed']:
      sys.exit(whole['failed'])
  lost = [a['end'] - b['start'] for a, b in itertools.pairwise(trained)]
  one, other = digest(killed), digest(peace)
  return {
    'minutes': options.minutes,
    'kills': len(runs),
    'resumes': sum(x['start'] > 0 for x in trained),
    'steps': last,
    'lost_steps_at_most': max(lost, default=0),
    'lost_steps_mean': sum(lost) / max(len(lost), 1),
    'differing_items': sum(one.get(n) != s for n, s in other.items()),
    'megabytes_at_kills': halves([x['megabytes'][-1] for x in trained]),
    'megabytes_undisturbed': halves(whole['megabytes']),
    'damaged_steps': len(list((killed / 'corrupt').glob('*'))),
  }


def main() -> None:
  """Soaks and reports."""
  parser = common.parser(
    __doc__,
    minutes=30.0,
    every=20.0,  # seconds
    seed=0,  # of the moments
    config='configs/photos.py',
    workdir=None,  # kept; a temporary one is not
  )
  options, flags = parser.parse_known_args()
  with tempfile.TemporaryDirectory(prefix='soak_') as temporary:
    workdir = Path(options.workdir or temporary).resolve()
    for name in ('killed', 'peace'):
      shutil.rmtree(workdir / name, ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    # Every start would otherwise spend its twenty seconds compiling.
    compiled = str(workdir / 'compiled')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', compiled)
    flags = [
      # It must not depend on the number of steps, which is not known before.
      '--config.optimizer.schedule=constant',
      '--config.checkpoint_every=10',
      *flags,
    ]
    result = soak(options, flags, workdir)
  print(json.dumps(result, indent=2))
  sys.exit(bool(result['differing_items']))


if __name__ == '__main__':
  main()
