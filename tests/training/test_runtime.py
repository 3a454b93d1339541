"""Memory that a step frees is there for the next; programs are kept."""

import os
import subprocess
import sys

import jax
import pytest

from rvq_jax.training import runtime

FAULTS = """
import resource
import jax
import jax.numpy as jnp
from rvq_jax.training import runtime

print(runtime.keep_freed_memory())
step = jax.jit(lambda x: jnp.sort(jnp.sin(x))[::-1] * 2)
x = jnp.ones(2**24)
for _ in range(3):
  step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**env):
  """Whether memory is kept, and page faults of three calls."""
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('MALLOC_')
  }
  output = subprocess.run(
    [sys.executable, '-c', FAULTS],
    env=inherited | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''} | env,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()
  return output[0] == 'True', int(output[1])


@pytest.mark.slow
@pytest.mark.skipif(
  not sys.platform.startswith('linux'), reason='glibc is of Linux'
)
def test_kept_memory_is_not_faulted_in_again():
  kept, few = faults()
  default, many = faults(MALLOC_ARENA_MAX='8')  # the user's word counts
  assert kept and not default
  assert many > 10_000  # 64 MiB of 4 KiB pages in each call
  assert few < many / 2


def test_an_accelerator_leaves_the_allocator_alone(monkeypatch):
  for name in [n for n in os.environ if n.startswith('MALLOC_')]:
    monkeypatch.delenv(name)
  monkeypatch.setattr(runtime, 'computes_on_cpu', lambda: False)
  assert not runtime.keep_freed_memory()


def test_the_user_says_where_programs_are_kept(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  assert str(runtime.cache_programs()) == before  # conftest's
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    folder = runtime.cache_programs()
    assert folder.parent == tmp_path / 'rvq_jax' / 'compiled'
    assert jax.config.jax_compilation_cache_dir == str(folder)
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
