"""However a run ends, its last saved step is complete and it resumes."""

import os
import signal
import subprocess
import time

import pytest
from tiny_step import before_step

from rvq_jax.training import loop
from rvq_jax.training.preemption import StopSignal

pytestmark = pytest.mark.usefixtures('default_signals')
CODES = dict(SIGINT=130, SIGTERM=143, SIGUSR1=138, SIGUSR2=140, SIGHUP=129)


@pytest.mark.parametrize('name', CODES)
def test_a_signal_finishes_the_step_saves_and_says_so(name):
  number = getattr(signal, name)
  before = signal.getsignal(number)
  with StopSignal() as stop:
    signal.raise_signal(number)
    assert stop.agreed(ask=False)
  assert stop.exit_code == CODES[name] == 128 + number
  assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored():
  with StopSignal():  # restores the handlers
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.agreed(ask=False)


@pytest.mark.slow
def test_a_run_stopped_by_every_signal_in_turn_ends_in_the_same_bits(
  start_run, tiny_config, tmp_path, final_bits, steps_of
):
  tiny_config.num_steps = 500
  tiny_config.checkpoint_every = 0  # only the signals save
  tiny_config.eval_every = 0
  stopped, whole = tmp_path / 'stopped', tmp_path / 'whole'
  start = 0
  for name, code in CODES.items():
    run = start_run(stopped)
    assert int(run.wait_for(r'; step (\d+) of')[1]) == start
    run.wait_for(f'step {start + 7}/500')
    os.kill(run.pid, getattr(signal, name))
    assert 'Traceback' not in run.end()
    assert run.returncode == code, name
    *_, newest = steps_of(stopped)
    assert start + 7 <= newest < 500
    start = newest
  for workdir in (stopped, whole):
    assert 'step 500/500' in start_run(workdir).end()
  assert final_bits(tiny_config, stopped) == final_bits(tiny_config, whole)


STALLED = """
import sys, time
from rvq_jax.data.loaders import MemoryLoader
load = MemoryLoader.__next__
def stall(loader):
  if loader.position()['step'] == 3:
    print('stalled', file=sys.stderr, flush=True)
    for _ in range(1000):  # a signal just before a sleep is seen after it
      time.sleep(0.1)
  return load(loader)
MemoryLoader.__next__ = stall
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(start_run, tmp_path):
  run = start_run(tmp_path / 'run', before=STALLED)
  run.wait_for('stalled')
  os.kill(run.pid, signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):  # the first one is patient
    run.wait(timeout=2)
  os.kill(run.pid, signal.SIGINT)
  start = time.monotonic()
  text = run.end()
  assert time.monotonic() - start < 5
  assert run.returncode == 130
  assert text == 'interrupted; finished work is kept\n'


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('end', [ZeroDivisionError(), SystemExit(3)], ids=repr)
def test_any_end_leaves_the_last_saved_step_complete(
  end, tiny_config, tiny_run, tmp_path, final_bits, steps_of
):
  def fail():
    raise end

  # Step 4 has just been handed to be saved.
  with before_step(5, fail), pytest.raises(type(end)):
    loop.train(tiny_config, tmp_path)
  assert steps_of(tmp_path)[-1] == 4
  loop.train(tiny_config, tmp_path)
  assert final_bits(tiny_config, tmp_path) == final_bits(tiny_config, tiny_run)
