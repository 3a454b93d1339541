"""A quantizer is imported when it is asked for, and by name."""

import pytest

from rvq_jax.quantize import registry

LAYER = """
import sys
import jax
from rvq_jax import VectorQuantizer
z = jax.numpy.ones((2, 3))
layer = VectorQuantizer(codebook_size=4)
jax.eval_shape(layer.init_with_output, jax.random.key(0), z)
print(*sys.modules)
"""


def test_the_layer_imports_no_other_quantizer_and_no_optimizer(run_python):
  loaded = set(run_python(LAYER).stdout.split())
  others = {path.rpartition('.')[0] for path in registry.QUANTIZERS.values()}
  others.remove('rvq_jax.quantize.vector_quantizer')
  assert 'rvq_jax.quantize.vector_quantizer' in loaded
  assert not loaded & (others | {'optax', 'rvq_jax.training'})


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match='expected one of vq, residual, multi'):
    registry.make_quantizer('lfq')
