"""Training as a person runs it."""

import json
from pathlib import Path

import pytest
from tiny_flags import TINY

from rvq_jax.commands import train


@pytest.mark.parametrize(
  ('workdir', 'arguments'),
  [
    ('runs/x', '--workdir=runs/x --output=x.html'),
    ('my run', "'--workdir=my run' '--output=my run.html'"),
    ('.', '--workdir=. --output={here}.html'),
  ],
)
def test_the_next_command_can_be_pasted(
  workdir, arguments, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  result = {'tokens': 2, 'images': 1, 'bits_per_image': 8, 'psnr': 20.0}
  line = train._summary(result, Path(workdir)).splitlines()[-1]
  assert line == f'next: rvq explore {arguments.format(here=tmp_path.name)}'


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
  explore = Path(__file__).parents[2] / 'launch/explore.py'  # as was typed
  assert next_.startswith(f'next: python {explore} --workdir={workdir}')
  assert 'Traceback' not in done.stderr
  # Looking for fonts is not to keep a run from its first step.
  assert done.stderr.index('matplotlib') > done.stderr.index('step 3/3')
  file = workdir / 'evaluation/test/metrics.json'
  stored = json.loads(file.read_text())
  assert stored['images'] == 11
  again = run('evaluate', f'--workdir={workdir}', '--split=test')
  assert again.returncode == 0, again.stderr
  assert json.loads(file.read_text()) == stored
