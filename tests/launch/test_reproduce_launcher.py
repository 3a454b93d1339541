"""The launcher of the paper's tables refuses what it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'expected --config=NAME'),
    (
      ['--config=configs/photos.py', '--table=34'],
      "all or objectives, got '34'",
    ),
    (['--config=configs/photos.py', '--seeds=0'], 'at least 1, got 0'),
    (
      ['--config=configs/photos.py', '--table=4', '--num_steps=-3'],
      'config.num_steps: expected at least 1, got -3',
    ),
  ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(
  flags, message, tmp_path
):
  done = subprocess.run(
    [
      *(sys.executable, 'launch/reproduce.py'),
      *(f'--workdir={tmp_path / "grid"}', *flags),
    ],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'grid').exists()
