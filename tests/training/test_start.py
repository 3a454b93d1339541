"""The state that a run starts from."""

from unittest import mock

import jax
import numpy as np
import pytest
from tiny_step import Run, bits

from rvq_jax.training import step as step_lib
from rvq_jax.training import writers
from rvq_jax.training.loop import train

SMALL = {'jit(stage)', 'jit(_threefry_seed)', 'jit(schedule)'}


@pytest.mark.usefixtures('one_device')
def test_before_its_first_line_a_run_compiles_two_large_programs(
  tiny_config, tmp_path, monkeypatch
):
  """Operations outside of `jit` would be compiled one by one."""
  compiled = []

  def listen(event, _, fun_name='', **rest):
    if event.endswith('backend_compile_duration'):
      compiled.append(fun_name)

  stop = mock.Mock(side_effect=InterruptedError)
  monkeypatch.setattr(writers.Progress, 'report', stop)
  tiny_config.log_every = 1
  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with pytest.raises(InterruptedError):
      train(tiny_config, tmp_path)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled.index('jit(init)') < compiled.index('jit(train_step)')
  assert {*compiled} - {'jit(init)', 'jit(train_step)'} <= SMALL


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_the_first_state_has_the_bits_of_the_optimized_program(
  tiny_config, monkeypatch
):
  fast = Run(tiny_config)
  optimized = {'xla_backend_optimization_level': 3}
  monkeypatch.setattr(step_lib, 'FAST_COMPILE', optimized)
  params = [run.init(run.key).params for run in (fast, Run(tiny_config))]
  assert bits(params[0]) == bits(params[1])


def test_random_codes_expect_the_mean_count_of_a_microbatch(tiny_config):
  tiny_config.batch_size, tiny_config.accumulate_steps = 16, 2
  tiny_config.model.init_from = 'normal'
  run = Run(tiny_config)
  book = run.init(run.key).codebook['vq']
  expected = 8 * 4 * 4 / 16  # images, positions, K
  np.testing.assert_array_equal(book['cluster_size'], np.full(16, expected))
  np.testing.assert_allclose(
    book['embedding_sum'], expected * np.asarray(book['embedding']), rtol=1e-6
  )


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_learned_codes_that_are_frozen_on_resume_stay(
  tiny_config, tmp_path, final_bits
):
  tiny_config.model.ema, tiny_config.num_steps = False, 2
  train(tiny_config, tmp_path)
  before = final_bits(tiny_config, tmp_path)
  tiny_config.num_steps, tiny_config.freeze = 4, 'codes'
  train(tiny_config, tmp_path)
  after = final_bits(tiny_config, tmp_path)
  same = {name: before[name] == after[name] for name in before}
  # What is evaluated stays, and what is frozen is that.
  raw, average = (
    f"{x}['vq']['embedding']" for x in ('.params', ".averages['params']")
  )
  assert same[average] and not same[raw] and after[raw] == after[average]
  assert not same[".params['encoder']['conv0']['kernel']"]
