"""Eight CPU devices, strict broadcasting, warnings as errors."""

import os

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
