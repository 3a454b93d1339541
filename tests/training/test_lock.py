"""Two processes never train in one workdir."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from rvq_jax.training import loop
from rvq_jax.training.lock import workdir_lock

HOLD = """
import sys
from rvq_jax.training.lock import workdir_lock
with workdir_lock(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds the lock of tmp_path."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def test_the_second_process_is_refused_and_told_of_the_first(
  holder, tmp_path, tiny_config
):
  for _ in range(2):  # the refusal does not spoil what the holder wrote
    with pytest.raises(ValueError, match='is in use by') as caught:
      loop.train(tiny_config, tmp_path)
  message = str(caught.value)
  assert f'process {holder.pid} on {socket.gethostname()}, since 20' in message
  assert re.search(r'since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d', message)
  assert '\n' not in message and str(tmp_path) in message
  assert not (tmp_path / 'checkpoints').exists()


def test_a_killed_process_frees_its_lock(holder, tmp_path):
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  with workdir_lock(tmp_path):
    pass


def test_a_lock_is_free_after_its_run(tmp_path):
  for _ in range(2):
    with workdir_lock(tmp_path):
      assert str(os.getpid()) in (tmp_path / '.lock').read_text()


def test_a_lock_that_says_nothing_is_a_lock_all_the_same(tmp_path, holder):
  (tmp_path / '.lock').write_text('')
  with pytest.raises(ValueError, match='in use by another process'):
    workdir_lock(tmp_path).__enter__()


def test_a_workdir_that_cannot_be_is_named(tmp_path, tiny_config):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot make the folder .*/file/run'):
    loop.train(tiny_config, tmp_path / 'file' / 'run')
