"""launch/slurm.sh, without a cluster."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / 'launch'


def test_the_slurm_script_is_clean():
  script = LAUNCH / 'slurm.sh'
  subprocess.run(['bash', '-n', script], check=True)
  beside_python = str(Path(sys.executable).parent)
  shellcheck = shutil.which('shellcheck', path=beside_python) or shutil.which(
    'shellcheck'
  )
  assert shellcheck, 'expected shellcheck of the extra test on PATH'
  done = subprocess.run(
    [shellcheck, script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


def test_the_slurm_options_stand_before_the_first_command():
  # sbatch reads no option behind it.
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  head = lines[: lines.index('set -uo pipefail')]
  options = [x.split()[1] for x in head if x.startswith('#SBATCH ')]
  assert len(options) == sum('#SBATCH' in line for line in lines)
  assert '--requeue' in options
  assert any(x.startswith('--signal=USR1@') for x in options)


@pytest.mark.parametrize(
  ('code', 'restarts', 'requeued'),
  [
    (0, 0, False),
    (2, 0, False),
    (1, 0, False),
    (75, 0, True),
    (134, 0, True),
    (138, 0, True),
    (143, 19, True),
    (143, 20, False),
  ],
)
def test_a_job_that_saved_or_lost_a_process_is_requeued(
  code, restarts, requeued, tmp_path
):
  commands = {
    'scontrol': 'echo scontrol "$@" >> calls\n',
    'srun': f'echo "${{@:4}}" >> calls\nexit {code}\n',
  }
  for name, text in commands.items():
    (tmp_path / name).write_text(f'#!/bin/bash\n{text}')
    (tmp_path / name).chmod(0o755)
  environment = os.environ | {
    'PATH': f'{tmp_path}:{os.environ["PATH"]}',
    'SLURM_SUBMIT_DIR': str(tmp_path),
    'SLURM_JOB_ID': '7',
    'SLURM_RESTART_COUNT': str(restarts),
  }
  done = subprocess.run(
    ['bash', LAUNCH / 'slurm.sh', '--config=a b.py'], env=environment
  )
  assert done.returncode == code
  calls = (tmp_path / 'calls').read_text().splitlines()
  assert calls[0] == 'python launch/main.py --multihost --config=a b.py'
  assert ('scontrol requeue 7' in calls) == requeued
