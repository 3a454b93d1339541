"""Commands as a person runs them: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RVQ = 'from rvq_jax.cli import main; main()'


@pytest.fixture(scope='session')
def run():
  """Returns a function that runs `python launch/NAME.py ARGUMENTS`."""
  return lambda name, *arguments, **options: _run(
    ROOT / f'launch/{name}.py', *arguments, **options
  )


@pytest.fixture(scope='session')
def rvq():
  """Returns a function that runs `rvq ARGUMENTS`."""
  return lambda *arguments, program=RVQ, **options: _run(
    '-c', program, *arguments, PYTHONPATH=str(ROOT), **options
  )


def _run(*arguments, cwd=ROOT, **variables):
  flags = os.environ['XLA_FLAGS'].split()
  flags = ' '.join(f for f in flags if 'device_count' not in f)
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=cwd,
    env=os.environ | {'XLA_FLAGS': flags} | variables,
    capture_output=True,
    text=True,
    timeout=280,
  )
