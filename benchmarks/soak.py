"""Trains for half an hour while somebody kills it every twenty seconds.

python benchmarks/soak.py [--minutes=30] [--every=20] [--workdir=DIR]
  [--config=configs/photos.py] [--config-flags...]

A run is started, killed with SIGKILL at a random moment, started again, and so
on; then it is left to end. A second run with the same seed is undisturbed for
as many steps. Prints kills, resumes, steps that had to be taken again, items of
the last checkpoint whose digests differ between the two runs, and memory: of
the processes that were killed, at their end, and of the one undisturbed as it
went. Exit code 1 unless no bit differs and every start has succeeded.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CACHE = 'JAX_COMPILATION_CACHE_DIR'


class Run(subprocess.Popen):
  """A training process; reads its own lines and memory as it goes."""

  def __init__(self, command, log):
    super().__init__(
      command,
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.start, self.step, self.megabytes, self.lines = None, 0, [], []
    self._log = log
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    for line in self.stderr:
      self._log.write(line)
      self.lines.append(line)
      if found := re.search(r'; step (\d+) of \d+; ', line):
        self.start = self.step = int(found[1])
      elif found := re.search(r' step (\d+)/', line):
        self.step = int(found[1])
        self.megabytes.append(_resident(self.pid))

  def finish(self, how=None):
    """Ends the process and all that it started, or waits for its end."""
    if how is not None:
      os.killpg(self.pid, how)
    self.wait()
    self._reader.join()
    self._log.flush()


def _resident(pid: int) -> float:
  """Resident memory in MB; 0 where it cannot be read."""
  try:
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
  except (OSError, IndexError):
    return 0.0
  return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def digest(workdir: Path) -> dict[str, str]:
  """The digests of the newest checkpoint, which is read to check them."""
  import jax

  from rvq_jax import sharding
  from rvq_jax.training import build
  from rvq_jax.training import config as config_lib
  from rvq_jax.training.checkpoints import Checkpoints
  from rvq_jax.training.step import compile_init

  config = json.loads((workdir / 'config.json').read_text())
  nested = {}
  for name, value in config.items():
    group, _, leaf = name.rpartition('.')
    (nested.setdefault(group, {}) if group else nested)[leaf] = value
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.resolve()
    flat = config_lib.check_config(nested)
    first_state = compile_init(
      build.build_step(flat, flat['num_steps']),
      sharding.data_mesh(),
      *(flat['data.image_size'], flat['batch_size']),
    )
    checkpoints.restore(first_state.eval_shape(jax.random.key(0)), step)
    return {'step': str(step)} | checkpoints.meta(step)['digests']


def _halves(values: list[float]) -> list[float]:
  """The largest of the first and of the second half."""
  half = len(values) // 2
  return [max(part, default=0) for part in (values[:half], values[half:])]


def soak(options, flags, workdir: Path) -> dict:
  """Kills and resumes until the time is up; what has happened."""
  command = [sys.executable, 'launch/main.py', f'--config={options.config}']
  command += ['--config.log_every=1', *flags]
  rng = random.Random(options.seed)
  killed, peace = workdir / 'killed', workdir / 'peace'
  kills, reached, resumed, memory, failures = 0, [], [], [], []
  end = time.monotonic() + 60 * options.minutes
  with open(workdir / 'log.txt', 'w') as log:
    endless = [*command, f'--workdir={killed}', '--config.num_steps=1000000']
    while time.monotonic() < end:
      run = Run(endless, log)
      try:
        run.wait(timeout=rng.uniform(0.25, 1.75) * options.every)
        failures.append(''.join(run.lines[-3:]))
        run.finish()
        break
      except subprocess.TimeoutExpired:
        run.finish(signal.SIGKILL)
        kills += 1
      if run.start is not None:
        resumed.append(run.start)
        reached.append(run.step)
        memory.append(max(run.megabytes[-1:], default=0))
      print(f'kill {kills}: from step {run.start} to {run.step}', flush=True)
    last = max(reached, default=0) + 20
    for folder in (killed, peace):
      run = Run(
        [*command, f'--workdir={folder}', f'--config.num_steps={last}'], log
      )
      if folder == killed:
        print(f'undisturbed up to step {last}')
      run.finish()
      if run.returncode:
        failures.append(''.join(run.lines[-3:]))
  lost = [a - b for a, b in zip(reached, resumed[1:], strict=False)]
  if failures:
    sys.exit('failed:\n' + '\n'.join(failures))
  one, other = digest(killed), digest(peace)
  return {
    'minutes': options.minutes,
    'kills': kills,
    'resumes': sum(start > 0 for start in resumed),
    'steps': last,
    'lost_steps_at_most': max(lost, default=0),
    'lost_steps_mean': sum(lost) / max(len(lost), 1),
    'differing_items': sum(one.get(n) != s for n, s in other.items()),
    'megabytes_at_kills': _halves(memory),
    'megabytes_undisturbed': _halves(run.megabytes),
    'damaged_steps': len(list((killed / 'corrupt').glob('*'))),
  }


def main() -> None:
  """Soaks and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=float, default=30)
  parser.add_argument('--every', type=float, default=20, help='seconds')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--config', default='configs/photos.py')
  parser.add_argument('--workdir', help='kept; default: a temporary folder')
  options, flags = parser.parse_known_args()
  with tempfile.TemporaryDirectory(prefix='soak_') as temporary:
    workdir = Path(options.workdir or temporary).resolve()
    shutil.rmtree(workdir / 'killed', ignore_errors=True)
    shutil.rmtree(workdir / 'peace', ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    # Every start would otherwise spend its twenty seconds compiling.
    os.environ.setdefault(_CACHE, str(workdir / 'compiled'))
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
