"""Commands as a person runs them: in a process of their own."""

import functools
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RVQ = 'from rvq_jax.cli import main; main()'


@pytest.fixture(scope='session')
def one_device_python(run_python):
  flags = os.environ['XLA_FLAGS'].split()
  flags = ' '.join(f for f in flags if 'device_count' not in f)
  return functools.partial(run_python, XLA_FLAGS=flags)


@pytest.fixture(scope='session')
def run(one_device_python):
  """Returns a function that runs `python launch/NAME.py ARGUMENTS`."""
  return lambda name, *arguments, **options: one_device_python(
    ROOT / f'launch/{name}.py', *arguments, **options
  )


@pytest.fixture(scope='session')
def rvq(one_device_python):
  """Returns a function that runs `rvq ARGUMENTS`."""
  return lambda *arguments, program=RVQ, **options: one_device_python(
    program, *arguments, PYTHONPATH=str(ROOT), **options
  )
