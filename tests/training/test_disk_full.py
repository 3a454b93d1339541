"""A full disk costs one line and no checkpoint."""

import errno
import os
import subprocess

import pytest

from rvq_jax.training import loop


@pytest.fixture
def small_disk(make_disk):
  """A file system of its own, with room for one tiny checkpoint, not two."""
  return make_disk('600k')


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_older_step_resumes(
  small_disk, start_run, tiny_config, tmp_path, final_bits, steps_of
):
  tiny_config.checkpoint_every = 1
  tiny_config.keep_checkpoints = 6
  whole, run = tmp_path / 'whole', small_disk / 'run'
  start_run(whole).end()
  process = start_run(run)
  *_, last = process.end().splitlines()
  assert process.returncode == 2
  assert 'Traceback' not in ''.join(process.seen)
  assert last.startswith(
    f'error: No space left while writing to {run}, where 0.'
  )
  [*_, newest] = steps_of(run)
  assert 1 <= newest < 6
  final_bits(tiny_config, run)  # sound
  subprocess.run(
    ['mount', '-o', 'remount,size=8m', str(small_disk)], check=True
  )
  text = start_run(run).end()
  assert f'step {newest} of 6' in text
  assert final_bits(tiny_config, run) == final_bits(tiny_config, whole)


LIMITED = """
import resource, sys
sys.path.insert(0, '.')
from rvq_jax.commands import train
# A checkpoint has a file of 22 kB.
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
train.main()
"""


@pytest.mark.slow
def test_a_limit_on_files_is_named(start_run, tmp_path, steps_of):
  script = tmp_path / 'limited.py'
  script.write_text(LIMITED)
  process = start_run(tmp_path / 'run', script=str(script))
  *_, last = process.end().splitlines()
  assert process.returncode == 2
  assert 'Traceback' not in ''.join(process.seen)
  assert last.startswith('error: File too large while writing to ')
  assert steps_of(tmp_path / 'run') == []


def test_a_workdir_that_finds_no_room_is_one_line(
  tiny_config, tmp_path, monkeypatch
):
  workdir, make = tmp_path / 'run', os.mkdir

  def full(path, *options):
    if str(path).startswith(str(tmp_path)):
      raise OSError(errno.ENOSPC, 'No space left on device', str(path))
    make(path, *options)

  monkeypatch.setattr(os, 'mkdir', full)
  with pytest.raises(OSError, match='No space left while writing') as caught:
    loop.train(tiny_config, workdir)
  assert '\n' not in str(caught.value) and str(workdir) in str(caught.value)
