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
  with one_line(f'before JAX starts .*{DETERMINISTIC}'):
    train(tiny_config, tmp_path / 'run')


COMPILE = """
import jax, jax.numpy as jnp
from benchmarks.absent_gpu import absent_gpu
from rvq_jax import Codebook, ema_update
where = jax.sharding.SingleDeviceSharding(absent_gpu())
struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
  shape, dtype, sharding=where
)
book = Codebook(struct(512, 64), struct(512), struct(512, 64))
update = jax.jit(lambda *x: ema_update(*x, decay=0.99))
lowered = update.lower(book, struct(4096, 64), struct(4096, dtype=jnp.int32))
print(lowered.compile({'xla_gpu_autotune_level': 0}).as_text())
"""


@pytest.mark.slow
def test_its_update_of_the_codebook_has_no_scatter_by_atomics(run_python):
  # Needs no GPU. A scatter over unique indices needs no atomics.
  atomic, deterministic = (
    run_python(COMPILE, XLA_FLAGS=flags) for flags in ('', DETERMINISTIC)
  )
  if 'needs the CUDA plugin' in atomic.stderr:
    pytest.skip('needs the CUDA plugin')
  assert atomic.returncode == deterministic.returncode == 0, atomic.stderr

  def scatters(done):
    lines = [x for x in done.stdout.splitlines() if ' scatter(' in x]
    return [line for line in lines if 'unique_indices=true' not in line]

  assert scatters(atomic)
  assert not scatters(deterministic)
