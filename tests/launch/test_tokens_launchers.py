"""encode and decode as a person runs them: in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rvq_jax import load
from rvq_jax.tokens.shards import TokenSource
from rvq_jax.tokens.tiling import reconstruct_images

ROOT = Path(__file__).resolve().parents[2]


def run(launcher, *arguments, **variables):
  env = os.environ | {'XLA_FLAGS': ''}
  return subprocess.run(
    [sys.executable, f'launch/{launcher}.py', *map(str, arguments)],
    cwd=ROOT,
    env=env | variables,
    capture_output=True,
    text=True,
    timeout=280,
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['encode'], 'expected --workdir=DIR and an image'),
    (
      ['encode', '--workdir=x', '{png}', 'y.jpg'],
      "=FILE.rvq, or .*got 'y.jpg'",
    ),
    (['encode', '--workdir=x', '{folder}'], '=FOLDER, got none'),
    (['encode', '--workdir=x', '{folder}', 'y.rvq'], "=FOLDER .*got 'y.rvq'"),
    (['encode', '--workdir=x', 'phto.jpg'], 'there is no phto.jpg: expected'),
    (['encode', '--workdir=x', 'phto.jpg', 'y/'], 'there is no phto.jpg'),
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
  assert re.search(message, done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_files_and_data_sets_go_to_tokens_and_back(
  tiny_run, image_folder, tmp_path
):
  source = next((image_folder / 'test').rglob('*.png'))
  rvq, png = tmp_path / 'x.rvq', tmp_path / 'x.png'
  done = run('encode', f'--workdir={tiny_run}', source, rvq)
  assert done.returncode == 0, done.stderr
  assert '20 x 16 pixels' in done.stdout and 'JPEG' in done.stdout
  done = run('decode', f'--workdir={tiny_run}', rvq, png)
  assert done.returncode == 0, done.stderr
  image = np.asarray(Image.open(source))[None]
  np.testing.assert_allclose(
    np.asarray(Image.open(png)).astype(int),
    reconstruct_images(load(tiny_run), image)[0],
    atol=1,  # a process with other flags of XLA rounds otherwise
  )
  tokens, images = tmp_path / 'tokens', tmp_path / 'images'
  flags = (f'--input={image_folder}', f'--output={tokens}')
  done = run('encode', f'--workdir={tiny_run}', *flags)
  assert done.returncode == 0, done.stderr
  assert 'images/s' in done.stderr
  for split, count in (('train', 40), ('validation', 12), ('test', 11)):
    line = f'{split}: {count} images as tokens, in {tokens / split}'
    assert line in done.stdout.splitlines()
  flags = (f'--input={tokens}', f'--output={images}', '--format=webp')
  done = run('decode', f'--workdir={tiny_run}', *flags)
  assert done.returncode == 0, done.stderr
  assert len(list((images / 'train').glob('*.webp'))) == 40
  rvq.write_bytes(rvq.read_bytes()[:-1])
  done = run('decode', f'--workdir={tiny_run}', rvq, png)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize('output', ['tokens/', 'tokens', 'x.y/'])
def test_one_image_goes_to_a_folder_of_tokens(
  tiny_run, image_folder, tmp_path, output
):
  source = next((image_folder / 'test').rglob('*.png'))
  flags = (f'--input={source}', f'--output={tmp_path}/{output}')
  done = run('encode', f'--workdir={tiny_run}', *flags)
  assert done.returncode == 0, done.stderr
  tokens = TokenSource(tmp_path / output)
  assert len(tokens) == 1 and tokens[0].name == source.name


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_start(
  tiny_run, image_folder, tmp_path
):
  source = next((image_folder / 'test').rglob('*.png'))
  rvq, png = tmp_path / 'x.rvq', tmp_path / 'x.png'
  for launcher, given in (('encode', (source, rvq)), ('decode', (rvq, png))):
    cache = tmp_path / launcher
    done = run(
      *(launcher, f'--workdir={tiny_run}', *given),
      XDG_CACHE_HOME=str(cache),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    )
    assert done.returncode == 0, done.stderr
    assert list((cache / 'rvq_jax' / 'compiled').rglob('*-cache'))
