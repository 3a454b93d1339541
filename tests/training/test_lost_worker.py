"""Data workers end with their run: not before it, not after it."""

import contextlib
import os
import signal
import time

import psutil
import pytest


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
  start_run, tiny_config, tmp_path, final_bits, steps_of
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
  assert run.returncode == 75
  assert 'error: a data worker died' in text and 'Traceback' not in text
  newest = steps_of(killed)[-1]
  assert newest >= 50
  # Nobody is left behind.
  _, alive = psutil.wait_procs(workers, timeout=10)
  assert not alive
  tiny_config.num_steps = newest + 100
  start_run(killed, '--config.data.num_workers=0').end()
  start_run(whole, '--config.data.num_workers=0').end()
  assert final_bits(tiny_config, killed) == final_bits(tiny_config, whole)


def group_of(run):
  """The processes that were started in the group of a run, and still live."""
  found = []
  for process in psutil.process_iter():
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
      gone = process.status() == psutil.STATUS_ZOMBIE
      if os.getpgid(process.pid) == run.pid and not gone:
        found.append(process)
  return found


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGUSR1'])
def test_a_signal_to_all_processes_saves_and_the_rest_is_exact(
  name, start_run, tiny_config, tmp_path, final_bits, steps_of
):
  tiny_config.num_steps = 3000
  tiny_config.eval_every = 0
  tiny_config.checkpoint_every = 0
  tiny_config.data.crop = 'random_resized'
  tiny_config.data.num_workers = 2
  tiny_config.optimizer.schedule = 'constant'  # so that it may end sooner
  stopped, whole, newest = tmp_path / 'stopped', tmp_path / 'whole', 0
  for moment in ('starting', 'running'):
    run = start_run(stopped)
    if moment == 'starting':
      run.wait_for('; step 0 of')
      deadline = time.monotonic() + 30
      # The run, the tracker of shared memory and two workers.
      while len(group_of(run)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    else:
      run.wait_for(f'step {newest + 20}/')
    os.killpg(run.pid, getattr(signal, name))
    text = run.end()
    assert run.returncode == 128 + getattr(signal, name), run.seen
    assert 'Traceback' not in text and 'resource_tracker' not in text
    deadline = time.monotonic() + 10
    while group_of(run) and time.monotonic() < deadline:
      time.sleep(0.1)
    assert not group_of(run)
    before, newest = newest, steps_of(stopped)[-1]
    assert newest >= before + (20 if moment == 'running' else 1)
  tiny_config.num_steps = newest + 5
  start_run(stopped).end()
  start_run(whole, '--config.data.num_workers=0').end()
  assert final_bits(tiny_config, stopped) == final_bits(tiny_config, whole)
