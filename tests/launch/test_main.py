"""The launchers as a person runs them: in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
  '--config.batch_size=8',
  '--config.num_steps=3',
  '--config.data.split=official',
  '--config.data.image_size=16',
  '--config.model.widths=(4,8)',
  '--config.model.factor=4',
  '--config.model.num_res_blocks=0',
  '--config.model.num_heads=2',
  '--config.model.code_dim=4',
  '--config.model.codebook_size=16',
)


def run(launcher, *arguments):
  flags = os.environ['XLA_FLAGS'].split()
  flags = ' '.join(f for f in flags if 'device_count' not in f)
  return subprocess.run(
    [sys.executable, f'launch/{launcher}.py', *arguments],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    timeout=280,
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'expected --config=NAME, or the path of a config file; NAME is one'),
    (['--config=configs/none.py'], 'configs/none.py'),
    (
      ['--config=configs/cifar10.py:f5'],
      'error: expected configs/cifar10.py:f8, :f4, :best, :f4,best or '
      ':multiscale, got :f5',
    ),
    (['--config=configs/photos.py', 'stray'], "got 'stray'"),
    (['--config=configs/photos.py', '--wrkdir=x'], 'wrkdir'),
    (
      ['--config=configs/photos.py', '--config.model.typo=1'],
      'error: the config has no field typo',
    ),
    (
      ['--config=configs/photos.py', '--config.batch_size=abc'],
      "error: flag --config.batch_size=abc: expected an integer, got 'abc'",
    ),
    pytest.param(
      ['--config=configs/photos.py', '--config.model.remat=maybe'],
      "Non-boolean argument to boolean flag: 'maybe'",
      marks=pytest.mark.slow,
    ),
    (
      ['--config=configs/photos.py', '--config.model.codebook_size=-5'],
      'config.model.codebook_size: expected at least 1, got -5',
    ),
    (
      ['--config=configs/photos.py', '--config.data.name=folder:/no/where'],
      '/no/where',
    ),
    pytest.param(
      [
        '--config=configs/photos.py',
        '--init=/no',
        '--config.model.quantize_after=0',
      ],
      'expected a run with checkpoints in /no, or an export',
      marks=pytest.mark.slow,
    ),
    (
      ['--config=configs/photos.py', '--config.freeze=decoder'],
      "config.freeze: expected one of '', codes, 'encoder,codes', got 'dec",
    ),
    (
      ['--config=configs/photos.py', '--multihost'],
      'expected a scheduler such as SLURM, found none',
    ),
    pytest.param(
      ['--config=configs/photos.py', '--multihost', '--process_id=0'],
      'together or none of them, got None, None, 0',
      marks=pytest.mark.slow,
    ),
    (
      ['--config=configs/photos.py', '--process_id=0'],
      'expected --multihost too',
    ),
  ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(
  flags, message, tmp_path
):
  done = run('main', *flags, f'--workdir={tmp_path}/run')
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  assert message in lines[0]
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--workdir=DIR'),
    (['--workdir=/no/where'], 'expected a run with checkpoints in /no/where'),
    (['--workdir=/no/where', '--step=last'], 'expected a number or best'),
  ],
)
def test_a_wrong_evaluation_ends_in_one_line_and_exit_code_2(flags, message):
  done = run('evaluate', *flags)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_main_trains_evaluates_and_draws(image_folder, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  monkeypatch.setenv('PYTHONPROFILEIMPORTTIME', '1')
  done = run(
    'main',
    '--config=configs/cifar10.py:f4',
    f'--config.data.name=folder:{image_folder}',
    f'--workdir={workdir}',
    *TINY,
  )
  assert done.returncode == 0, done.stderr
  assert 'step 3/3' in done.stderr and 'left' in done.stderr
  assert f'\n{workdir}, test split\n' in f'\n{done.stdout}'
  made, look, next_ = done.stdout.splitlines()[-3:]
  assert made.startswith('made: a tokenizer, 16 tokens of 4 bits an image')
  assert Path(look.removeprefix('look: ')).is_file()
  assert next_.startswith(f'next: python launch/explore.py --workdir={workdir}')
  assert 'Traceback' not in done.stderr
  # Looking for fonts is not to keep a run from its first step.
  assert done.stderr.index('matplotlib') > done.stderr.index('step 3/3')
  stored = json.loads((workdir / 'evaluation/test/metrics.json').read_text())
  assert stored['images'] == 11
  assert (workdir / 'evaluation/test/reconstructions.png').exists()
  monkeypatch.delenv('PYTHONPROFILEIMPORTTIME')
  again = run('evaluate', f'--workdir={workdir}', '--split=test')
  assert again.returncode == 0, again.stderr
  again = json.loads((workdir / 'evaluation/test/metrics.json').read_text())
  assert again == stored
