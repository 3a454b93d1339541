"""kill -9 at any moment changes no bit of a run."""

import signal
import time

import numpy as np
import pytest

STEPS, EVERY = 400, 10


@pytest.mark.slow
@pytest.mark.parametrize(('route', 'kills'), [('memory', 8), ('grain', 10)])
def test_kills_leave_the_bits_of_an_uninterrupted_run(
  route, kills, start_run, tiny_config, tmp_path, final_bits, log_of
):
  tiny_config.num_steps, tiny_config.checkpoint_every = STEPS, EVERY
  tiny_config.eval_every = 100
  if route == 'grain':
    tiny_config.data.crop = 'random_resized'
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  start_run(whole).end()
  rng = np.random.default_rng(20)
  reached, resumed = [], []
  for _ in range(kills):
    run = start_run(killed)
    resumed.append(int(run.wait_for(r'; step (\d+) of')[1]))
    # A step takes 3 ms and a save 100: the one before is still under way.
    target = resumed[-1] + int(rng.integers(1, 5 * EVERY))
    reached.append(min(target, STEPS - 1))
    run.wait_for(rf'step {reached[-1]}/')
    time.sleep(rng.uniform(0, 0.05))
    run.kill()
    run.end()
    assert run.returncode == -signal.SIGKILL
  assert len(set(reached)) > kills / 2 and max(resumed) > STEPS / 8
  # At most the steps since the complete checkpoint before the one under way.
  lost = np.subtract(reached[:-1], resumed[1:])
  assert lost.max() <= 2 * EVERY, lost
  run = start_run(killed)
  run.end()
  assert run.returncode == 0, run.seen
  assert final_bits(tiny_config, killed) == final_bits(tiny_config, whole)
  assert log_of(killed) == log_of(whole)
  left = [p.name for p in (killed / 'checkpoints').iterdir()]
  assert all(name.isdecimal() for name in left)
  assert not (killed / 'corrupt').exists()


@pytest.mark.slow
def test_kills_of_a_run_on_tars_leave_the_bits_of_one_on_the_folder(
  image_shards, start_run, tiny_config, tmp_path, final_bits
):
  tiny_config.num_steps, tiny_config.checkpoint_every = 60, EVERY
  tiny_config.data.crop, tiny_config.data.num_workers = 'random', 2
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  start_run(whole).end()
  tiny_config.data.name = image_shards('wds')
  for step in (13, 34, 51):
    run = start_run(killed)
    run.wait_for(f'step {step}/')
    run.kill()
    run.end()
  run = start_run(killed)
  assert int(run.wait_for(r'; step (\d+) of')[1]) >= 30
  run.end()
  assert run.returncode == 0, run.seen
  assert final_bits(tiny_config, killed) == final_bits(tiny_config, whole)


KILLED_WHILE_SAVING = """
import os, signal
import orbax.checkpoint as ocp
saver = ocp.path.atomicity.AtomicRenameTemporaryPath
finalize = saver.finalize
async def finalize_and_die(self):
  dies = self._final_path.name == '4'
  if not dies or {after}:
    await finalize(self)
  if dies:
    os.kill(os.getpid(), signal.SIGKILL)
saver.finalize = finalize_and_die
"""


@pytest.mark.slow
@pytest.mark.parametrize('after', [False, True])
def test_a_kill_inside_a_save_leaves_the_last_complete_step(
  after, start_run, tiny_config, tmp_path, final_bits, steps_of
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  start_run(whole).end()
  run = start_run(killed, before=KILLED_WHILE_SAVING.format(after=after))
  run.end()
  assert run.returncode == -signal.SIGKILL
  last = 4 if after else 3
  assert steps_of(killed)[-1] == last
  left = [p.name for p in (killed / 'checkpoints').iterdir()]
  assert any('tmp' in name for name in left) != after
  text = start_run(killed).end()
  assert f'step {last} of 6' in text
  assert final_bits(tiny_config, killed) == final_bits(tiny_config, whole)
