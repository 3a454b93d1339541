"""The commands of README and docs/ are understood by the programs they name."""

import argparse
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from doc_blocks import ROOT, blocks, commands
from PIL import Image

from rvq_jax.cli import COMMANDS
from rvq_jax.commands import program
from rvq_jax.data.prepare import write_tfds
from rvq_jax.quantize import gradients
from rvq_jax.training.build import build_step
from rvq_jax.training.config import check_config

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# What stands for a number of the reader's.
NUMBERS = dict(K=512, F=8, S=1, SEED=1, N=4, I=1, WAIT=50, DECAY=0.9)
NUMBERS['STEPS'] = 20_000
WORDS = {'Q': 'residual', 'R': 'torch'}
MADE = 'rvq train --config=mine_f8.py'  # from a block of the guide
AT_COMMIT = r'at (?:commit )?[0-9a-f]{7}\b'


def lines(page):
  """The commands of a page with values, without those of an earlier commit."""
  for before, code in re.findall(
    r'((?:[^\n]*\n){2})```(?:bash|sh)\n(.*?)^```$',
    page.read_text(),
    re.S | re.M,
  ):
    for part in re.split('^(?=#)', code, flags=re.M):  # a comment begins one
      if re.search(AT_COMMIT, before + part.partition('\n')[0]):
        continue
      for command in commands(part):
        if not command.startswith(('#', MADE)):
          yield from map(filled, command.split(' && '))


def filled(command):
  """A command as a shell expands it, with values for its capitals."""
  command = command.partition(' #')[0]
  assert not re.search(r'[|;&$`<>]', command), f'would run: {command}'
  for name, value in (NUMBERS | WORDS).items():
    command = re.sub(rf'=\[?{name}\b', f'={value}', command)
  done = subprocess.run(
    ['bash', '-c', f'printf "%s\\n" {command}'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


ALL = [words for page in PAGES for words in lines(page)]
OURS = [words for words in ALL if words[0] == 'rvq']
SCRIPTS = [x for x in ALL if x[0] == 'python' and x[1].endswith('.py')]


class Parsed(Exception):
  """Raised in the place of what a program does after it has read its flags."""


@pytest.fixture(autouse=True)
def programs_end_after_their_flags(monkeypatch):
  def run(function, values, paths):
    raise Parsed(values)

  def parse(self, *args):
    values, rest = read(self, *args)
    if any(not x.startswith('--config.') for x in rest):
      self.error(f'unknown: {rest}')
    raise Parsed(values)

  read = argparse.ArgumentParser.parse_known_args
  monkeypatch.setattr(program, '_run', run)
  for name in ('parse_args', 'parse_known_args'):
    monkeypatch.setattr(argparse.ArgumentParser, name, parse)


@pytest.mark.parametrize('words', OURS, ids=' '.join)
def test_rvq_takes_the_command(words):
  with pytest.raises(Parsed) as parsed:
    COMMANDS[words[1]].main(words[2:], 'rvq')
  if config := getattr(parsed.value.args[0], 'config', None):
    flat = check_config(config)
    build_step(flat, flat['num_steps'] or 10**6)


@pytest.mark.parametrize('words', SCRIPTS, ids=' '.join)
def test_the_script_takes_the_flags(words, monkeypatch):
  script = str(ROOT / words[1])
  monkeypatch.setattr(sys, 'argv', [script, *words[2:]])
  known = dict(gradients.ESTIMATORS)  # benchmarks/tried.py adds to them
  monkeypatch.setattr(gradients, 'ESTIMATORS', known)
  monkeypatch.syspath_prepend(Path(script).parent)
  with pytest.raises(Parsed):
    runpy.run_path(script, run_name='__main__')


def test_every_command_is_looked_at():
  others = {words[0] for words in ALL} - {'rvq', 'python'}
  assert others <= {'pip', 'sbatch', 'bash'}
  assert len(OURS) > 20 and len(SCRIPTS) > 10


def python_block(name, marker):
  (code,) = (
    code
    for _, code in blocks((ROOT / 'docs' / name).read_text(), 'python')
    if marker in code
  )
  return code


def test_a_shipped_tokenizer_opens():
  scope = {}
  exec(python_block('pretrained.md', 'pretrained:'), scope)
  assert scope['tokenizer'].codebook_size == 4096


@pytest.mark.slow
def test_the_bound_of_a_data_set(tmp_path):
  """On a set of 8 colors, which need no 224 bits."""

  def read(i):
    color = (int(x) * 255 for x in f'{i:03b}')
    png = io.BytesIO()
    Image.new('RGB', (32, 32), tuple(color)).save(png, 'png')
    return {'image': png.getvalue(), 'label': i}

  features = {'image': tfds.features.Image(shape=(32, 32, 3))}
  features['label'] = tfds.features.ClassLabel(num_classes=8)
  splits = {name: (range(8), read) for name in ('train', 'test')}
  write_tfds('cifar10', '1.0.0', str(tmp_path), lambda: (features, splits))
  bits = []
  scope = {'DIR': str(tmp_path), 'print': bits.append}
  exec(python_block('results.md', 'gaussian_bound'), scope)
  assert bits[0].shape == (3,) and (bits[0] < 1e-4).all()


def test_the_operations_of_the_network_of_the_field(capsys):
  exec(python_block('predictions.md', 'cost_analysis'), {})
  counted = re.findall(r'code (\S+)', capsys.readouterr().out)
  said = re.search(
    r'takes (\d+) GFLOP to encode and (\d+) GFLOP to decode',
    ' '.join((ROOT / 'docs/predictions.md').read_text().split()),
  )
  np.testing.assert_allclose(
    [float(x) for x in counted], [float(x) for x in said.groups()], rtol=0.02
  )
