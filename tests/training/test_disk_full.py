"""A full disk costs one line and no checkpoint."""

import errno
import os
import subprocess

import pytest
from errors import one_line

from rvq_jax.training import loop


def last_line(process):
  """Waits for a run that ends in an error of one line."""
  *_, last = process.end().splitlines()
  assert process.returncode == 2
  assert 'Traceback' not in ''.join(process.seen)
  return last


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_older_step_resumes(
  make_disk, start_run, tiny_config, tmp_path, final_bits, steps_of
):
  disk = make_disk('600k')  # room for one checkpoint, not two
  tiny_config.checkpoint_every = 1
  tiny_config.keep_checkpoints = 6
  whole, run = tmp_path / 'whole', disk / 'run'
  start_run(whole).end()
  last = last_line(start_run(run))
  assert f'error: No space left while writing to {run}, where 0.' in last
  [*_, newest] = steps_of(run)
  assert 1 <= newest < 6
  final_bits(tiny_config, run)  # sound
  subprocess.run(['mount', '-o', 'remount,size=8m', str(disk)], check=True)
  text = start_run(run).end()
  assert f'step {newest} of 6' in text
  assert final_bits(tiny_config, run) == final_bits(tiny_config, whole)


@pytest.mark.slow
def test_a_limit_on_files_is_named(start_run, tmp_path, steps_of):
  limit = 'from resource import *; setrlimit(RLIMIT_FSIZE, (20_000, 20_000))'
  # A checkpoint has a file of 22 kB.
  last = last_line(start_run(tmp_path / 'run', before=limit))
  assert last.startswith('error: File too large while writing to ')
  assert steps_of(tmp_path / 'run') == []


def test_a_workdir_without_room_is_one_line(tiny_config, tmp_path, monkeypatch):
  workdir, make = tmp_path / 'run', os.mkdir

  def full(path, *options):
    if str(path).startswith(str(tmp_path)):
      raise OSError(errno.ENOSPC, 'No space left on device', str(path))
    make(path, *options)

  monkeypatch.setattr(os, 'mkdir', full)
  with one_line(f'No space left while writing to {workdir}', OSError):
    loop.train(tiny_config, workdir)
