"""A GPU that XLA compiles for although it is not there."""

import sys

import jax
from jax.experimental import topologies

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def absent_gpu():
  """An H100 that programs can be compiled for and that need not be there."""
  jax.config.update('jax_platforms', 'cpu')
  try:
    (device,) = topologies.get_topology_desc(
      platform='cuda', target_config=H100, topology='1x1x1'
    ).devices
  except NotImplementedError:
    sys.exit('needs the CUDA plugin: pip install "jax[cuda12]", or cuda13')
  return device
