"""However a run ends, its last saved step is complete and it resumes."""

import os
import signal
import subprocess
import time

import pytest
from tiny_step import before_step

from rvq_jax.training import loop
from rvq_jax.training.preemption import StopSignal

CODES = {
  'SIGINT': 130,
  'SIGTERM': 143,
  'SIGUSR1': 138,
  'SIGUSR2': 140,
  'SIGHUP': 129,
}


@pytest.fixture
def whole(tiny_run):
  """The run of six steps that nobody stopped."""
  return tiny_run


@pytest.mark.parametrize('name', CODES)
def test_a_signal_finishes_the_step_saves_and_says_so(name):
  with StopSignal() as stop:
    signal.raise_signal(getattr(signal, name))
    assert stop.agreed(ask=False)
  assert stop.exit_code == CODES[name] == 128 + getattr(signal, name)


def test_the_handlers_from_before_are_put_back():
  before = [signal.getsignal(getattr(signal, name)) for name in CODES]
  with StopSignal():
    pass
  assert before == [signal.getsignal(getattr(signal, name)) for name in CODES]


def test_a_signal_that_is_ignored_stays_ignored():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.agreed(ask=False)
  finally:
    signal.signal(signal.SIGHUP, old)


@pytest.mark.slow
def test_a_run_stopped_by_every_signal_in_turn_ends_in_the_same_bits(
  start_run, tiny_config, tmp_path, final_bits, steps_of
):
  tiny_config.num_steps = 500
  tiny_config.checkpoint_every = 0  # what is saved, a signal saved
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
sys.path.insert(0, 'launch')
from rvq_jax.data.loaders import MemoryLoader
load = MemoryLoader.__next__
def stall(loader):
  if loader.position()['step'] == 3:
    print('stalled', file=sys.stderr, flush=True)
    time.sleep(100)
  return load(loader)
MemoryLoader.__next__ = stall
import command_line, main
command_line.run(main.main)
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(start_run, tmp_path):
  script = tmp_path / 'stalled.py'
  script.write_text(STALLED)
  run = start_run(tmp_path / 'run', script=str(script))
  run.wait_for('stalled')
  os.kill(run.pid, signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):  # the first one is patient
    run.wait(timeout=2)
  os.kill(run.pid, signal.SIGINT)
  start = time.monotonic()
  text = run.end()
  assert time.monotonic() - start < 5
  assert run.returncode == 130
  assert text == 'interrupted; what was finished is kept\n'


class Fault(Exception):
  """Something that nobody foresaw."""


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('end', [Fault('no'), SystemExit(3)], ids=repr)
def test_any_end_leaves_the_last_saved_step_complete(
  end, tiny_config, tmp_path, whole, final_bits, steps_of
):
  def fail():
    raise end

  # Step 4 has just been handed to be saved.
  with before_step(5, fail), pytest.raises(type(end)):
    loop.train(tiny_config, tmp_path)
  assert steps_of(tmp_path)[-1] == 4
  loop.train(tiny_config, tmp_path)
  assert final_bits(tiny_config, tmp_path) == final_bits(tiny_config, whole)
