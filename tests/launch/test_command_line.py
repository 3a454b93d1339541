"""Freed memory stays for the next step; programs are kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / 'launch'
FAULTS = f"""
import resource, sys
sys.path.insert(0, {str(LAUNCH)!r})
import command_line
import jax
import jax.numpy as jnp

command_line.prepare_backend()
jax.config.update('jax_enable_compilation_cache', False)
step = jax.jit(lambda x: jnp.sort(jnp.sin(x))[::-1] * 2)
x = jnp.ones(2**24)
for _ in range(3):
  step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CACHE = f"""
import sys
sys.path.insert(0, {str(LAUNCH)!r})
import command_line, jax
command_line.prepare_backend()
print(jax.config.jax_compilation_cache_dir)
"""


def run(code, **variables):
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('MALLOC_', 'JAX_COMPILATION', 'XLA_FLAGS'))
  }
  return subprocess.run(
    [sys.executable, '-c', code],
    env=inherited | {'JAX_PLATFORMS': 'cpu'} | variables,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is of Linux')
def test_kept_memory_is_not_faulted_in_again():
  [few] = run(FAULTS)
  [many] = run(FAULTS, MALLOC_ARENA_MAX='8')  # what users set wins
  assert int(many) > 10_000  # 64 MiB of 4 KiB pages in each call
  assert int(few) < int(many) / 2


def test_programs_are_kept_per_cpu_unless_the_user_says_where(tmp_path):
  [folder] = run(CACHE, XDG_CACHE_HOME=str(tmp_path))
  assert Path(folder).parent == tmp_path / 'rvq_jax' / 'compiled'
  [folder] = run(CACHE, JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'mine'))
  assert folder == str(tmp_path / 'mine')
