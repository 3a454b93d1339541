"""A data worker that is killed ends the run with the cause, at once."""

import os
import signal
import time

import psutil
import pytest

from rvq_jax.training import manifest


def workers_of(run):
  found = [
    child
    for child in psutil.Process(run.pid).children(recursive=True)
    if 'spawn_main' in ' '.join(child.cmdline())
  ]
  assert len(found) == 2
  return found


@pytest.mark.slow
def test_the_workers_of_a_killed_run_do_not_outlive_it(
  start_run, tiny_config, tmp_path
):
  tiny_config.num_steps = 3000
  tiny_config.eval_every = 0
  tiny_config.data.crop = 'random_resized'
  tiny_config.data.num_workers = 2
  run = start_run(tmp_path / 'run')
  run.wait_for('step 20/')
  workers = workers_of(run)
  os.kill(run.pid, signal.SIGKILL)
  _, alive = psutil.wait_procs(workers, timeout=10)
  for worker in alive:
    worker.kill()
  assert not alive


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_the_rest_is_exact(
  start_run, tiny_config, tmp_path, final_bits
):
  tiny_config.num_steps = 3000
  tiny_config.checkpoint_every = 50
  tiny_config.eval_every = 0
  tiny_config.data.crop = 'random_resized'
  tiny_config.data.num_workers = 2
  tiny_config.optimizer.schedule = 'constant'  # so that it may end sooner
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  run = start_run(killed)
  run.wait_for('step 120/')
  workers = workers_of(run)
  start = time.monotonic()
  os.kill(workers[0].pid, signal.SIGKILL)
  text = run.end()
  assert time.monotonic() - start < 30
  assert run.returncode == 2
  assert 'error: a data worker died' in text and 'Traceback' not in text
  [newest, *_] = manifest.steps(killed / 'checkpoints')
  assert newest >= 50
  # Nobody is left behind.
  _, alive = psutil.wait_procs(workers, timeout=10)
  assert not alive
  tiny_config.num_steps = newest + 100
  start_run(killed, '--config.data.num_workers=0').end()
  start_run(whole, '--config.data.num_workers=0').end()
  assert final_bits(tiny_config, killed) == final_bits(tiny_config, whole)
