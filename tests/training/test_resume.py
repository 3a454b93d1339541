"""A run that is cut off and resumed ends in the bits of one that is not."""

import pytest
from tiny_step import run_until

from rvq_jax.training import loop
from rvq_jax.training.checkpoints import Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize('route', ['memory', 'stream', 'multiscale'])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(
  route, tiny_config, tmp_path, final_bits, log_of, caplog
):
  caplog.set_level('INFO')
  if route == 'stream':
    tiny_config.data.crop = 'random_resized'
  if route == 'multiscale':
    tiny_config.model.quantizer = 'multiscale'
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  loop.train(tiny_config, whole)
  run_until(tiny_config, parts, 4)  # the cosine is that of the whole run
  assert f'saved in {parts}; the same command resumes' in caplog.text
  with Checkpoints(parts, read_only=True) as checkpoints:
    assert checkpoints.resolve() == 4
  loop.train(tiny_config, parts)
  got, want = (final_bits(tiny_config, d) for d in (parts, whole))
  assert got.keys() == want.keys()
  assert [k for k in want if got[k] != want[k]] == []
  # The log holds each step once, with the same values.
  assert log_of(parts) == log_of(whole)
