"""A GPU that JAX cannot use is said before the work."""

import pytest

from rvq_jax.training.backend import gpu_advice

LIB = {'jaxlib': '0.11.2'}


@pytest.mark.parametrize(
  ('plugins', 'gpu', 'message'),
  [
    ({}, False, ''),
    ({'jax-cuda12-plugin': '0.11.2'}, True, ''),
    ({'jax-cuda12-plugin': '0.11.2', 'jax-cuda13-plugin': '0.9.0'}, True, ''),
    ({}, True, 'that JAX does not see: pip install "jax[cuda12]==0.11.2"'),
    (
      {'jax-cuda13-plugin': '0.9.0'},
      False,
      'jax-cuda13-plugin 0.9.0 does not fit jaxlib 0.11.2, so that JAX sees no '
      'GPU: pip install "jax[cuda13]==0.11.2"',
    ),
  ],
)
def test_what_to_install_is_said_in_one_line(plugins, gpu, message):
  advice = gpu_advice(LIB | plugins, gpu)
  assert message in advice and bool(message) == bool(advice)
