"""A quantizer is imported when it is asked for, and by name."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import pytest

from rvq_jax.quantize.registry import (
  QUANTIZERS,
  make_quantizer,
  quantizer_class,
)

ROOT = Path(__file__).resolve().parents[2]
LAYER = """
import sys
import jax
from rvq_jax import VectorQuantizer
z = jax.numpy.ones((2, 3))
layer = VectorQuantizer(codebook_size=4)
jax.eval_shape(layer.init_with_output, jax.random.key(0), z)
print(*sys.modules)
"""


def test_the_layer_imports_no_other_quantizer_and_no_optimizer():
  run = subprocess.run(
    [sys.executable, '-c', LAYER],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  loaded = set(run.stdout.split())
  others = {path.rpartition('.')[0] for path in QUANTIZERS.values()}
  others.remove('rvq_jax.quantize.vector_quantizer')
  assert 'rvq_jax.quantize.vector_quantizer' in loaded
  assert not loaded & (others | {'optax', 'rvq_jax.training'})


@pytest.mark.parametrize('name', QUANTIZERS)
def test_a_name_gives_its_class(name):
  layer = make_quantizer(name, codebook_size=16)
  assert isinstance(layer, nn.Module)
  assert type(layer) is quantizer_class(name)


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match='expected one of vq, residual, multi'):
    make_quantizer('lfq')
