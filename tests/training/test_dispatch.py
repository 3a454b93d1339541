"""Several steps in one call, the set on the device: the same run."""

import jax
import numpy as np
import pytest

from rvq_jax.training import loop
from rvq_jax.training.dispatch import dispatch_size


def calls(start, end, most, *intervals):
  """(first step, steps) of each call."""
  taken, step = [], start
  while step < end:
    count = dispatch_size(step, most, end, *intervals)
    taken.append((step, count))
    step += count
  return taken


def test_calls_end_where_something_is_due_and_at_the_end():
  taken = calls(0, 23, 4, 8, 10, 0)
  ends = {step + count for step, count in taken}
  assert {8, 16, 10, 20, 23} <= ends
  assert (0, 4) in taken and (4, 4) in taken and (12, 4) in taken
  assert {count for _, count in taken} == {1, 4}


@pytest.mark.parametrize('start', range(0, 23))
def test_calls_after_an_interruption_are_those_of_the_whole_run(start):
  whole = calls(0, 23, 4, 6, 10)
  if start in {step for step, _ in whole}:
    assert calls(start, 23, 4, 6, 10) == [c for c in whole if c[0] >= start]


@pytest.mark.parametrize(
  'on_device', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_several_steps_a_call_are_the_steps_one_by_one(
  on_device, tiny_config, tmp_path, final_bits, log_of
):
  tiny_config.log_every = tiny_config.checkpoint_every = 3
  loop.train(tiny_config, tmp_path / 'single')
  tiny_config.steps_per_dispatch = 3
  tiny_config.data.on_device = on_device
  loop.train(tiny_config, tmp_path / 'several')
  got, want = (log_of(tmp_path / n) for n in ('several', 'single'))
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_set_on_the_device_gives_the_same_bits(
  tiny_config, tmp_path, final_bits
):
  tiny_config.num_steps = 3
  loop.train(tiny_config, tmp_path / 'host')
  tiny_config.data.on_device = True
  loop.train(tiny_config, tmp_path / 'device')
  host, device = (
    final_bits(tiny_config, tmp_path / n) for n in ('host', 'device')
  )
  assert host == device


def test_a_streamed_set_cannot_be_on_the_device(tiny_config, tmp_path):
  tiny_config.data.crop = 'random'
  tiny_config.data.on_device = True
  with pytest.raises(ValueError, match='on_device: expected False'):
    loop.train(tiny_config, tmp_path)


@pytest.mark.slow
def test_remat_changes_what_is_kept_and_not_the_step(tiny_config, tmp_path):
  trainers = []
  for remat in (False, True):
    tiny_config.model.remat = remat
    trainers.append(loop.Run(tiny_config, tmp_path))
  batch = trainers[0].feed.next(1)
  texts, losses = [], []
  for run in trainers:
    state = run.init(run.key)
    step = jax.make_jaxpr(run.train_step)(state, batch)
    texts.append(str(step).count('conv_general_dilated'))
    losses.append(run.train_step(state, batch)[1])
  blocks = 2 * tiny_config.model.num_res_blocks
  assert texts[1] == texts[0] + 2 * blocks
  for name, value in losses[0].items():
    np.testing.assert_allclose(losses[1][name], value, rtol=1e-3, atol=1e-6)
