"""The guide's blocks run as they are shown, from the first to the last."""

import json
import re
import tomllib

import numpy as np
import pytest
from doc_blocks import ROOT, SHORT, blocks, commands, run_command
from PIL import Image

GUIDE = ROOT / 'docs' / 'guide.md'
TEXT = GUIDE.read_text()
SHORT_EXAMPLE = ('--num_steps=4', '--width=8', '--depth=1', '--fd_images=0')


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A folder to work in that has the examples of a checkout."""
  (tmp_path / 'examples').symlink_to(ROOT / 'examples')
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.slow
def test_the_blocks_run_in_their_order(checkout):
  scope = {}
  for language, code in blocks(TEXT, 'bash', 'python'):
    if language == 'python' and 'def get_config' in code:
      (checkout / 'mine_f8.py').write_text(code)
    elif language == 'python':
      exec(code, scope)
    else:
      for command in commands(code):
        if command.startswith('pip install'):
          continue
        more = SHORT if command.startswith('rvq train') else ()
        more = SHORT_EXAMPLE if 'generate/main.py' in command else more
        run_command(command, checkout, *more)
  assert scope['K'] == 1024 and scope['targets'].shape == (16, 256)
  assert np.all(scope['inputs'][:, 0] == scope['K'])
  assert np.array_equal(scope['inputs'][:, 1:], scope['targets'][:, :-1])
  assert scope['targets'].max() < scope['K']
  # A table of pairs is worth something: less than a uniform guess.
  assert scope['bits'] < np.log2(scope['K'])
  with Image.open('samples.png') as image:
    assert image.size == (8 * 64, 64)
  assert len(list((checkout / 'images').glob('*.png'))) == 206
  assert (checkout / 'export' / 'model.safetensors').exists()
  config = json.loads((checkout / 'runs/mine_f8/config.json').read_text())
  assert config['model.factor'] == 8
  assert scope['images'].shape == (8, 64, 64, 3)
  bits = json.loads((checkout / 'runs/generator/metrics.json').read_text())
  assert bits['bits_per_token'] < 11
  with Image.open('runs/generator/samples.png') as image:
    assert image.size == (8 * 64, 8 * 64)
  for run in ('mine', 'mine_f8', 'tuned', 'swapped'):
    assert (checkout / 'runs' / run / 'evaluation/test/metrics.json').exists()
  for name in re.findall(r'`(\w+\.png)`', TEXT):
    assert (checkout / 'runs/mine/evaluation/test' / name).exists()


def test_the_layer_learns_in_nnx_and_evaluation_leaves_its_codes():
  (code,) = (code for _, code in blocks(TEXT, 'python') if 'ToNNX' in code)
  scope = {}
  exec(code, scope)
  assert scope['losses'][-1] < 0.9 * scope['losses'][0]
  assert scope['y'].shape == (128, 16) and scope['ids'].shape == (128,)
  quantizer, x = scope['autoencoder'].quantizer, scope['x']

  def codes():
    return np.asarray(quantizer.embedding[...])

  trained = codes()
  scope['autoencoder'](x, train=False)
  np.testing.assert_array_equal(codes(), trained)
  scope['train_step'](scope['autoencoder'], scope['optimizer'], x)
  assert np.any(codes() != trained)
  fresh = scope['Autoencoder'](x, scope['nnx'].Rngs(0))
  assert not np.any(fresh.quantizer.cluster_size[...])  # filled by training


def test_links_lead_to_files():
  for target in re.findall(r'\]\(([^)#]+)\)', TEXT):
    assert (GUIDE.parent / target).exists(), target


def test_the_table_of_extras_is_that_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  table = TEXT[TEXT.index('| extra |') :]
  names = ' '.join(re.findall(r'^\| (`.*?) \|', table, re.MULTILINE))
  assert set(re.findall(r'\w+', names)) == set(project['optional-dependencies'])


def test_the_page_on_reliability_names_tests_that_exist():
  text = (ROOT / 'docs' / 'reliability.md').read_text()
  names = re.findall(r'`(?:\w+/)?(test_\w+\.py)`', text)
  tests = {path.name for path in (ROOT / 'tests').rglob('test_*.py')}
  assert len(names) > 10 and set(names) <= tests
