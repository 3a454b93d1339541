"""The search, compiled for an absent GPU, multiplies in float32."""

import re

import pytest

COMPILE = """
import jax, jax.numpy as jnp
from benchmarks.absent_gpu import absent_gpu  # and tiles as on a GPU
from rvq_jax import nearest_codes
where = jax.sharding.SingleDeviceSharding(absent_gpu())
e, codes = (
  jax.ShapeDtypeStruct((n, 256), jnp.float32, sharding=where)
  for n in (32768, 16384)
)
nearest_codes.lower(e, codes).compile({'xla_gpu_autotune_level': 0})
"""


@pytest.mark.slow
def test_no_score_comes_from_a_product_in_lower_precision(run_python, tmp_path):
  done = run_python(COMPILE, XLA_FLAGS=f'--xla_dump_to={tmp_path}')
  if 'needs the CUDA plugin' in done.stderr:
    pytest.skip('needs the CUDA plugin')
  assert done.returncode == 0, done.stderr
  kernels = ''.join(path.read_text() for path in tmp_path.glob('*.ptx'))
  assert 'fma.rn.f32' in kernels
  # Tensor cores multiply in TF32 or 16 bits: wgmma and mma instructions.
  assert re.findall(r'mma\.\S+', kernels) == []
  (program,) = tmp_path.glob('*nearest_codes*after_optimizations.txt')
  products = re.findall(r'(?:dot|custom-call)\(.*', program.read_text())
  products = [line for line in products if 'dot_general' in line]
  assert products
  for line in products:
    assert re.search(r'(?i)precision"?[=:][{\[]"?highest"?,"?highest', line)
