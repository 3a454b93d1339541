"""Runs in processes of their own, and their files."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import Run, named_bits

from rvq_jax.data.workers import STOP_SIGNALS
from rvq_jax.models import lpips, lpips_weights
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


class Process(subprocess.Popen):
  """A running `launch/main.py`; its lines are read by `wait_for`."""

  def wait_for(self, pattern: str) -> re.Match:
    """Reads lines until one matches; fails when the run ends before."""
    for line in self.stderr:
      self.seen.append(line)
      if match := re.search(pattern, line):
        return match
    raise AssertionError(f'no {pattern!r} in\n' + ''.join(self.seen))

  def end(self) -> str:
    """Waits for the end; the rest of standard error."""
    text = self.stderr.read()
    self.wait(timeout=60)
    self.seen.append(text)
    return text


@pytest.fixture
def default_signals():
  """Signals as in the foreground, even under nohup or in a background job.

  There some are ignored, and StopSignal and child processes keep that.
  """
  ignored = [n for n in STOP_SIGNALS if signal.getsignal(n) == signal.SIG_IGN]
  for number in ignored:
    signal.signal(number, signal.SIG_DFL)
  yield
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def start_run(tiny_config, tmp_path):
  """Returns a function that starts a run of `tiny_config` in a process.

  Each step writes a line 'step N/M'. `before` is a program that the process
  runs first. What still runs at the end of the test is killed.
  """
  running, file, script = [], tmp_path / 'tiny.py', tmp_path / 'script.py'
  flags_of_one = os.environ['XLA_FLAGS'].split()  # one device
  flags_of_one = [flag for flag in flags_of_one if 'device_count' not in flag]

  def start(workdir, *flags, before='', **options):
    script.write_text(
      f"import runpy, sys\nsys.path.insert(0, 'launch')\n{before}\n"
      "if __name__ == '__main__':\n"
      "  runpy.run_path('launch/main.py', run_name='__main__')\n"
    )
    tiny_config.log_every = 1
    file.write_text(
      'import json\nfrom ml_collections import ConfigDict\ndef get_config():\n'
      f'  return ConfigDict(json.loads({tiny_config.to_json()!r}))\n'
    )
    paths = f'--config={file}', f'--workdir={workdir}'
    run = Process(
      [sys.executable, script, *paths, *flags],
      cwd=ROOT,
      env=os.environ | {'XLA_FLAGS': ' '.join(flags_of_one)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
      **options,
    )
    run.seen = []
    running.append(run)
    return run

  yield start
  for run in running:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(run.pid, signal.SIGKILL)
    run.stderr.close()
    run.wait()


@pytest.fixture(scope='session')
def make_step_config(load_config, image_folder):
  """Returns a function of fields that gives a small config with them."""

  def make(fields):
    config = load_config('cifar10')
    config.batch_size, config.num_steps = 8, 4
    config.data.image_size, config.data.split = 8, 'official'
    config.data.name = f'folder:{image_folder}'
    config.model.update({'widths': (8,), 'factor': 2, 'num_res_blocks': 0})
    config.model.update({'num_heads': 2, 'code_dim': 8, 'codebook_size': 8})
    config.update_from_flattened_dict(fields)
    return config

  return make


@pytest.fixture(scope='session')
def lpips_stand_in():
  """LPIPS without its 58 MB of weights: a squared error with one weight."""

  def distance(weights, x, y, *, dtype=None):
    return weights['scale'] * jnp.mean((x - y) ** 2, axis=(1, 2, 3))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lpips, 'distance', distance)
    patch.setattr(lpips_weights, 'load', lambda: {'scale': np.float32(2.0)})
    yield


@pytest.fixture(scope='session')
def final_bits():
  """Returns a function: path -> bytes of the newest state of a run."""

  def read(config, workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
      newest = checkpoints.resolve()
      return named_bits(checkpoints.restore(Run(config).template, newest))

  return read


@pytest.fixture(scope='session')
def steps_of():
  """Returns a function: workdir -> its saved steps, oldest first."""
  return lambda workdir: sorted(
    int(path.name)
    for path in (workdir / 'checkpoints').glob('*')
    if path.name.isdecimal()
  )


@pytest.fixture(scope='session')
def log_of():
  """Returns a function: (step, name) -> value of a run's log."""
  return lambda workdir: {
    (record['step'], name): value
    for record in read_jsonl(workdir / 'metrics.jsonl')
    for name, value in record.items()
    if not name.endswith(('images_per_second', 'data_wait'))
  }
