"""launch/slurm.sh, without a cluster."""

import os
import shutil
import signal
import subprocess
import sys
import time
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
  assert any(x.startswith('--signal=B:USR1@') for x in options)


@pytest.fixture
def cluster(tmp_path):
  """A folder of commands that note how they were called."""
  commands = {
    'scontrol': '#!/bin/sh\necho scontrol "$@" >> calls\n',
    # To the whole task: Python and the shell in front of it.
    'scancel': '#!/bin/sh\necho scancel "$@" >> calls\n'
    'kill -TERM $(cat pids)\n',
    # One task after another, for each of $CODES; the highest code is its own.
    'srun': '#!/bin/bash\necho srun "${@:1:3}" >> calls\nhighest=0\n'
    'for code in $CODES; do\n'
    '  CODE=$code "${@:4}"\n  status=$?\n'
    '  if ((status > highest)); then highest=$status; fi\n'
    'done\nexit "$highest"\n',
    # Leaves with $CODE, or waits for a signal and leaves with 143.
    'python': '#!/bin/sh\necho python "$@" >> calls\n'
    '[ "$CODE" = wait ] || exit "$CODE"\n'
    "trap 'exit 143' TERM\necho $$ $PPID > pids\n"
    'while :; do sleep 0.05; done\n',
  }
  for name, text in commands.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def submit(cluster, **variables):
  environment = os.environ | {
    'PATH': f'{cluster}:{os.environ["PATH"]}',
    'SLURM_SUBMIT_DIR': str(cluster),
    'SLURM_JOB_ID': '7',
    **variables,
  }
  return subprocess.Popen(
    ['bash', str(LAUNCH / 'slurm.sh'), '--config=a b.py'], env=environment
  )


@pytest.mark.parametrize(
  ('codes', 'restarts', 'requeued'),
  [
    ('0 0', 0, False),
    ('2 2', 0, False),
    ('1', 0, False),
    ('75', 0, True),
    ('0 134', 0, True),
    ('75 2', 0, False),  # lost because another one found a mistake
    ('143', 99, True),
    ('143', 100, False),
  ],
)
def test_a_job_that_lost_a_process_goes_back_to_the_queue(
  codes, restarts, requeued, cluster
):
  process = submit(cluster, CODES=codes, SLURM_RESTART_COUNT=str(restarts))
  assert process.wait(20) == max(map(int, codes.split()))
  calls = (cluster / 'calls').read_text().splitlines()
  assert calls[0].startswith('srun --')
  assert calls[1] == 'python launch/main.py --multihost --config=a b.py'
  assert ('scontrol requeue 7' in calls) == requeued
  assert not list(cluster.glob('.*'))


def test_a_job_whose_time_ends_stops_the_run_and_is_requeued(cluster):
  process = submit(cluster, CODES='wait')
  end = time.monotonic() + 20
  while not (cluster / 'pids').exists() or not (cluster / 'pids').read_text():
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGUSR1)
  assert process.wait(20) == 143
  calls = (cluster / 'calls').read_text().splitlines()
  assert calls[2:] == ['scancel --signal=TERM 7', 'scontrol requeue 7']
