"""encode and decode as a person runs them: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rvq_jax import load
from rvq_jax.tokens.grid import reconstruct_images
from rvq_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]


def run(launcher, *arguments):
  return subprocess.run(
    [sys.executable, f'launch/{launcher}.py', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'},
    capture_output=True,
    text=True,
    timeout=280,
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['encode'], 'expected --workdir=DIR and an image'),
    (['encode', '--workdir=x', '{png}', 'y.jpg'], "=FILE.rvq, got 'y.jpg'"),
    (['encode', '--workdir=x', '{folder}'], '=FOLDER, got None'),
    (['encode', '--workdir=x', 'a', 'b', 'c'], 'at most 2 paths'),
    (['encode', '--workdir={folder}', '{png}'], 'a run with checkpoints'),
    (
      ['encode', '--workdir=x', '{folder}', 'y', '--split=tset'],
      'split: expected one of train, validation, test',
    ),
    (['decode'], 'expected --workdir=DIR and FILE.rvq'),
    (['decode', '--workdir=x', '{png}', 'y.jpg'], 'expected .png or .webp'),
    (['decode', '--workdir=x', '{folder}', 'y'], 'a folder of tokens'),
  ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(
  image_folder, arguments, message
):
  png = next(image_folder.rglob('*.png'))
  done = run(*(a.format(folder=image_folder, png=png) for a in arguments))
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_files_and_data_sets_go_to_tokens_and_back(
  tiny_config, image_folder, tmp_path
):
  workdir = tmp_path / 'run'
  loop.train(tiny_config, workdir)
  source = next((image_folder / 'test').rglob('*.png'))
  rvq, png = tmp_path / 'x.rvq', tmp_path / 'x.png'
  done = run('encode', f'--workdir={workdir}', source, rvq)
  assert done.returncode == 0, done.stderr
  assert '20 x 16 pixels' in done.stdout and 'JPEG' in done.stdout
  done = run('decode', f'--workdir={workdir}', rvq, png)
  assert done.returncode == 0, done.stderr
  image = np.asarray(Image.open(source))[None]
  np.testing.assert_allclose(
    np.asarray(Image.open(png)).astype(int),
    reconstruct_images(load(workdir), image)[0],
    atol=1,  # a process with other flags of XLA rounds otherwise
  )
  tokens, images = tmp_path / 'tokens', tmp_path / 'images'
  flags = (f'--input={image_folder}', f'--output={tokens}')
  done = run('encode', f'--workdir={workdir}', *flags)
  assert done.returncode == 0, done.stderr
  assert 'test: 11 images' in done.stdout and 'images/s' in done.stderr
  flags = (f'--input={tokens}', f'--output={images}', '--format=webp')
  done = run('decode', f'--workdir={workdir}', *flags)
  assert done.returncode == 0, done.stderr
  assert len(list((images / 'train').glob('*.webp'))) == 40
  rvq.write_bytes(rvq.read_bytes()[:-1])
  done = run('decode', f'--workdir={workdir}', rvq, png)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
