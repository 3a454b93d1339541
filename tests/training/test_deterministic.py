"""`config.deterministic`: programs for GPUs that add in a fixed order."""

import os

import jax
import pytest
from errors import one_line

from rvq_jax.training import backend
from rvq_jax.training.backend import DETERMINISTIC, NO_TRITON
from rvq_jax.training.loop import train

FLAG = """
import os, jax
from rvq_jax.training.backend import make_deterministic
make_deterministic()
assert jax.device_count() == 8  # what was set stays
make_deterministic()
print(os.environ['XLA_FLAGS'])
"""


def test_it_sets_the_flags_before_the_devices_start(run_python):
  flags = run_python(FLAG).stdout.split()
  assert flags.count(DETERMINISTIC) == flags.count(NO_TRITON) == 1


@pytest.mark.parametrize('flags', [NO_TRITON.replace('false', 'true'), ''])
def test_what_the_user_set_counts(monkeypatch, flags):
  monkeypatch.setattr(backend, 'backends_are_initialized', lambda: False)
  monkeypatch.setenv('XLA_FLAGS', flags)
  backend.make_deterministic()
  option = NO_TRITON.partition('=')[0]
  found = [x for x in os.environ['XLA_FLAGS'].split() if option in x]
  assert found[-1] == (flags or NO_TRITON)


def test_it_is_refused_once_they_have_started(tiny_config, tmp_path):
  jax.devices()
  tiny_config.deterministic = True
  with one_line(f'JAX has started .*{DETERMINISTIC}'):
    train(tiny_config, tmp_path / 'run')


COMPILE = """
import sys
sys.path.insert(0, 'benchmarks')
import common, gpu_program
from absent_gpu import absent_gpu
from rvq_jax import sharding
from rvq_jax.models import layers
from rvq_jax.training.backend import make_deterministic
if sys.argv[1:]:
  make_deterministic()
layers._has_fused_attention = lambda: False  # cuDNN need not be there
config = common.load_config('cifar10', 'f4')
config.model.num_res_blocks = 1  # blocks are alike
config.model.dtype = 'bfloat16'
mesh = sharding.data_mesh([absent_gpu()])
step = gpu_program.trace_step(mesh, config)
print(gpu_program.compile_step(step).as_text())
"""


@pytest.mark.slow
def test_its_step_compiles_and_has_no_scatter_by_atomics(run_python):
  # Needs no GPU. A scatter over unique indices needs no atomics.
  atomic = run_python(COMPILE)
  if 'needs the CUDA plugin' in atomic.stderr:
    pytest.skip('needs the CUDA plugin')
  deterministic = run_python(COMPILE, 'deterministic')
  for done in atomic, deterministic:
    assert done.returncode == 0, done.stderr[-3000:]

  def scatters(done):
    lines = [x for x in done.stdout.splitlines() if ' scatter(' in x]
    return [line for line in lines if 'unique_indices=true' not in line]

  assert scatters(atomic)
  assert not scatters(deterministic)
