"""Freed memory stays, programs are kept on disk, XLA has its fast kernels."""

import os
import platform
import re
import sys
from pathlib import Path

import pytest

PREPARED = """
import resource
import jax
import jax.numpy as jnp
from rvq_jax.training.backend import prepare_backend
prepare_backend()
"""
FAULTS = """
jax.config.update('jax_enable_compilation_cache', False)
step = jax.jit(lambda x: jax.lax.cumsum(x.reshape(2**12, -1), 1).T * 2)
x = jnp.ones(2**24)
for _ in range(10):
  step(x).block_until_ready()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(5):
  step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(faults, faults[1:])))
"""
CACHE = 'print(jax.config.jax_compilation_cache_dir)'
CUT_OFF = """
import os, pathlib, warnings
warnings.simplefilter('error')
for _ in range(3):
  jax.clear_caches()
  jax.jit(lambda x: x * 3)(jnp.ones(3))
  folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
  entries = [*folder.glob('*-cache')]
  print(min(path.stat().st_size for path in entries))
  for path in entries:
    os.truncate(path, 100)
"""
CONVOLUTION = """
same = lambda *a: jax.lax.conv_general_dilated(*a, (1, 1), 'SAME')
arrays = jnp.ones((8, 64, 32, 32)), jnp.ones((64, 64, 3, 3))
print('ynn_fusion' in jax.jit(same).lower(*arrays).compile().as_text())
"""
ANOTHER_JAXLIB = """
import os, jaxlib, pathlib
folder = pathlib.Path(os.environ['JAXLIB'])
(folder / 'libjax_common.so').write_bytes(b'xla_cpu_some_other_flag')
jaxlib.__file__ = str(folder / '__init__.py')
"""
FLAGS = "import os; print('ynn_fusion' in os.environ.get('XLA_FLAGS', ''))"


@pytest.fixture
def run(run_python, monkeypatch):
  """Returns a function: code -> what it prints in a prepared process."""

  for name in [x for x in os.environ if re.match('MALLOC_|JAX_COMP|XLA_F', x)]:
    monkeypatch.delenv(name)

  def call(code, first='', **variables):
    done = run_python(first + PREPARED + code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

  return call


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is of Linux')
def test_kept_memory_is_not_faulted_in_again(run):
  few = int(run(FAULTS))
  many = int(run(FAULTS, MALLOC_ARENA_MAX='8'))  # what users set wins
  assert many > 10_000  # 64 MiB of 4 KiB pages in each call
  assert few < many / 2


def test_programs_are_kept_per_cpu_unless_the_user_says_where(run, tmp_path):
  folder = run(CACHE, XDG_CACHE_HOME=str(tmp_path))
  assert Path(folder).parent == tmp_path / 'rvq_jax' / 'compiled'
  if platform.machine() == 'x86_64':
    assert not folder.endswith('-e3b0c442'), 'SHA-256 of nothing'
  mine = str(tmp_path / 'mine')
  assert run(CACHE, JAX_COMPILATION_CACHE_DIR=mine) == mine


def test_a_cut_off_program_is_compiled_anew_without_a_warning(run, tmp_path):
  always = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  sizes = run(CUT_OFF, XDG_CACHE_HOME=str(tmp_path), **always).split()
  assert len(sizes) == 3 and min(map(int, sizes)) > 100


@pytest.mark.slow
def test_convolutions_leave_ynnpack_unless_the_user_says_otherwise(run):
  assert run(CONVOLUTION) == 'False'
  option = '--xla_cpu_experimental_ynn_fusion_type=individual_convolution'
  assert run(CONVOLUTION, XLA_FLAGS=option) == 'True'


def test_a_flag_is_only_set_where_jaxlib_knows_it(run, tmp_path):
  assert run(FLAGS) == 'True'
  # An unknown one would end the process.
  assert run(FLAGS, first=ANOTHER_JAXLIB, JAXLIB=str(tmp_path)) == 'False'


def test_an_unknown_user_without_a_home_keeps_no_programs(run, monkeypatch):
  monkeypatch.delenv('HOME')
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  unknown = 'import pwd\npwd.getpwuid = {}.__getitem__\n'  # KeyError
  assert run(CACHE, first=unknown) == 'None'
