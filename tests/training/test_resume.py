"""A run that is cut off and resumed ends in the bits of one that is not."""

import pytest
from tiny_step import run_until

from rvq_jax.training import loop
from rvq_jax.training.checkpoints import Checkpoints

# Fields of the config, and the steps at which runs are stopped.
ROUTES = {
  'memory': ({}, [4]),
  'stream': ({'data.crop': 'random_resized'}, [4]),
  'multiscale': ({'model.quantizer': 'multiscale'}, [4]),
  'not yet quantized': ({'model.quantize_after': 3}, [2]),
  # Before the discriminator's first update, before its loss counts, and inside
  # the ramp.
  'adversarial': (
    {'num_steps': 30, 'log_every': 1, 'objective.adversarial_weight': 0.5},
    [6, 9, 12],
  ),
}


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('route', ROUTES)
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(
  route, tiny_config, tmp_path, final_bits, log_of, caplog
):
  caplog.set_level('INFO')
  fields, stops = ROUTES[route]
  tiny_config.update_from_flattened_dict(fields)
  whole = tmp_path / 'whole'
  loop.train(tiny_config, whole)
  want = final_bits(tiny_config, whole)
  assert ('discriminator' in ''.join(want)) == (route == 'adversarial')
  for step in stops:
    parts = tmp_path / f'stopped{step}'
    run_until(tiny_config, parts, step)  # the cosine is that of the whole run
    assert f'saved in {parts}; the same command resumes' in caplog.text
    with Checkpoints(parts, read_only=True) as checkpoints:
      assert checkpoints.resolve() == step
    loop.train(tiny_config, parts)
    got = final_bits(tiny_config, parts)
    assert [k for k in want if got[k] != want[k]] == [], step
    # The log holds each step once, with the same values.
    assert log_of(parts) == log_of(whole)
