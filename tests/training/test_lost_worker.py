"""Data workers end with their run: not before it, not after it."""

import contextlib
import os
import signal
import time

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('default_signals')]


@pytest.fixture
def long_config(tiny_config):
  """The config of `start_run`: 3000 steps, whose images two workers crop."""
  tiny_config.num_steps = 3000
  tiny_config.checkpoint_every = tiny_config.eval_every = 0
  tiny_config.data.crop = 'random_resized'
  tiny_config.data.num_workers = 2
  tiny_config.optimizer.schedule = 'constant'  # so that it may end sooner
  return tiny_config


def workers_of(run):
  children = psutil.Process(run.pid).children(recursive=True)
  workers = [x for x in children if 'spawn_main' in ' '.join(x.cmdline())]
  assert len(workers) == 2
  return workers


def test_a_run_and_its_workers_end_together_and_the_rest_is_exact(
  start_run, long_config, tmp_path, final_bits, steps_of
):
  long_config.checkpoint_every = 50
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  for step in (20, 120):
    run = start_run(killed)
    run.wait_for(f'step {step}/')
    workers, start = workers_of(run), time.monotonic()
    victim = run if step == 20 else workers[0]
    os.kill(victim.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    text = run.end()
  assert time.monotonic() - start < 30
  assert run.returncode == 75
  assert 'error: a data worker died' in text and 'Traceback' not in text
  newest = steps_of(killed)[-1]
  assert newest >= 50
  long_config.num_steps = newest + 100
  start_run(killed, '--config.data.num_workers=0').end()
  start_run(whole, '--config.data.num_workers=0').end()
  assert final_bits(long_config, killed) == final_bits(long_config, whole)


def group_of(run):
  """The live processes in the group of a run."""
  group = []
  for process in psutil.process_iter():
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
      gone = process.status() == psutil.STATUS_ZOMBIE
      if os.getpgid(process.pid) == run.pid and not gone:
        group.append(process)
  return group


def wait_for_group(run, sizes, seconds):
  deadline = time.monotonic() + seconds
  while len(group_of(run)) not in sizes and time.monotonic() < deadline:
    time.sleep(0.01)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_to_all_processes_saves_and_the_rest_is_exact(
  name, start_run, long_config, tmp_path, final_bits, steps_of
):
  stopped, whole, newest = tmp_path / 'stopped', tmp_path / 'whole', 0
  for moment in ('starting', 'running'):
    run = start_run(stopped)
    if moment == 'starting':
      run.wait_for('; step 0 of')
      # The run, the tracker of shared memory and two workers.
      wait_for_group(run, range(4, 9), seconds=30)
    else:
      run.wait_for(f'step {newest + 20}/')
    os.killpg(run.pid, getattr(signal, name))
    text = run.end()
    assert run.returncode == 128 + getattr(signal, name), run.seen
    assert 'Traceback' not in text and 'resource_tracker' not in text
    wait_for_group(run, [0], seconds=10)
    assert not group_of(run)
    before, newest = newest, steps_of(stopped)[-1]
    assert newest >= before + (20 if moment == 'running' else 1)
  long_config.num_steps = newest + 5
  start_run(stopped).end()
  start_run(whole, '--config.data.num_workers=0').end()
  assert final_bits(long_config, stopped) == final_bits(long_config, whole)
