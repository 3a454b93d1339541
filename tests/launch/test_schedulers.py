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
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  shellcheck = shutil.which('shellcheck', path=path)
  assert shellcheck, 'expected shellcheck of the extra test on PATH'
  subprocess.run([shellcheck, script], check=True)


def test_the_slurm_options_stand_before_the_first_command():
  # sbatch reads no option behind it.
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  head = lines[: lines.index('set -uo pipefail')]
  options = [x.split()[1] for x in head if x.startswith('#SBATCH ')]
  assert len(options) == sum('#SBATCH' in line for line in lines)
  assert '--requeue' in options
  assert any(x.startswith('--signal=USR1@') for x in options)


REQUEUED = [(75, 0), (134, 0), (138, 0), (143, 19)]
ENDED = [(0, 0), (2, 0), (1, 0), (143, 20)]


@pytest.mark.parametrize(('code', 'restarts'), REQUEUED + ENDED)
def test_a_job_that_saved_or_lost_a_process_is_requeued(
  code, restarts, tmp_path
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
  assert ('scontrol requeue 7' in calls) == ((code, restarts) in REQUEUED)
