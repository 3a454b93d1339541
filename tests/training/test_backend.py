"""Settings that are applied before JAX starts its devices."""

import importlib.metadata

import pytest

from rvq_jax.training.backend import gpu_advice


@pytest.mark.parametrize(
  ('cuda12', 'cuda13', 'gpu', 'message'),
  [
    (None, None, False, ''),
    ('0.11.2', None, True, ''),
    ('0.11.2', '0.9.0', True, ''),
    (None, None, True, 'of this machine: pip install "jax[cuda12]==0.11.2"'),
    (
      *(None, '0.9.0', False),
      'jax-cuda13-plugin 0.9.0 does not fit jaxlib 0.11.2, so JAX sees no '
      'GPU: pip install "jax[cuda13]==0.11.2"',
    ),
  ],
)
def test_one_line_says_what_to_install(
  monkeypatch, cuda12, cuda13, gpu, message
):
  installed = {'jax-cuda12-plugin': cuda12, 'jax-cuda13-plugin': cuda13}

  def version(name):
    if found := (installed | {'jaxlib': '0.11.2'})[name]:
      return found
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'version', version)
  advice = gpu_advice(gpu)
  assert message in advice and bool(message) == bool(advice)


EVALUATE = """
import os, sys
from jax._src.xla_bridge import backends_are_initialized
from rvq_jax.evaluation import evaluate as library
name = 'XLA_PYTHON_CLIENT_PREALLOCATE'
os.environ.pop(name, None)
def measure(*args, **kwargs):
  print(backends_are_initialized(), os.environ.get(name), flush=True)
  os._exit(0)
library.evaluate_run = measure
from rvq_jax.commands import evaluate
sys.argv[1:] = ['--workdir=run', '--perceptual']
evaluate.main()
"""


def test_perceptual_metrics_find_memory_on_the_gpu(run_python):
  done = run_python(EVALUATE)
  assert done.stdout.split() == ['False', 'false'], done.stderr
