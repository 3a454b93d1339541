"""The search, compiled for an absent GPU, multiplies in float32."""

import os
import re
import subprocess
import sys

import pytest

COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from benchmarks.gpu_memory import H100  # and tiles as on a GPU
from rvq_jax import nearest_codes
(device,) = topologies.get_topology_desc(
  platform='cuda', target_config=H100, topology='1x1x1'
).devices
where = jax.sharding.SingleDeviceSharding(device)
e, codes = (
  jax.ShapeDtypeStruct((n, 256), jnp.float32, sharding=where)
  for n in (32768, 16384)
)
nearest_codes.lower(e, codes).compile({'xla_gpu_autotune_level': 0})
"""


@pytest.mark.slow
def test_no_score_comes_from_a_product_in_lower_precision(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', COMPILE],
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_dump_to={tmp_path}'},
    capture_output=True,
    text=True,
  )
  if 'NotImplementedError' in done.stderr:
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
