"""Training as a person runs it."""

import json
from pathlib import Path

from tiny_flags import TINY


def test_training_evaluates_and_draws(image_folder, tmp_path, run):
  workdir = tmp_path / 'run'
  done = run(
    'main',
    '--config=configs/cifar10.py:f4',
    f'--config.data.name=folder:{image_folder}',
    f'--workdir={workdir}',
    '--config.num_steps=3',
    *TINY,
    PYTHONPROFILEIMPORTTIME='1',
  )
  assert done.returncode == 0, done.stderr
  assert 'step 3/3' in done.stderr and 'left' in done.stderr
  assert f'\n{workdir}, test split\n' in f'\n{done.stdout}'
  made, look, next_ = done.stdout.splitlines()[-3:]
  assert made.startswith('made: a tokenizer, 16 tokens of 4 bits per image')
  assert Path(look.removeprefix('look: ')).is_file()
  assert next_.startswith(f'next: python launch/explore.py --workdir={workdir}')
  assert 'Traceback' not in done.stderr
  # Looking for fonts is not to keep a run from its first step.
  assert done.stderr.index('matplotlib') > done.stderr.index('step 3/3')
  file = workdir / 'evaluation/test/metrics.json'
  stored = json.loads(file.read_text())
  assert stored['images'] == 11
  again = run('evaluate', f'--workdir={workdir}', '--split=test')
  assert again.returncode == 0, again.stderr
  assert json.loads(file.read_text()) == stored
