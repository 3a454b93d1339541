"""The rules of the house: imports point down, requirements agree."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
  'io': -1,
  'metrics': -1,
  'quantize': 0,
  'models': 1,
  'data': 1,
  'training': 2,
  'evaluation': 2,
  'tokens': 3,
  'explorer': 4,
}
SOURCES = sorted((ROOT / 'rvq_jax').rglob('*.py'))


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.name))
def test_imports_point_down(path):
  layer = path.relative_to(ROOT / 'rvq_jax').parts[0]
  for name in imported(path):
    parts = name.split('.')
    if parts[0] != 'rvq_jax' or layer not in LAYERS or len(parts) < 2:
      continue
    same = parts[1] == layer
    assert same or LAYERS[parts[1]] <= LAYERS[layer], name
    if not same and LAYERS[layer] == 1:
      assert LAYERS[parts[1]] == 0, name


@pytest.mark.parametrize(
  'path',
  [p for p in SOURCES if p.parent.name == 'quantize'],
  ids=lambda p: p.name,
)
def test_the_quantizer_needs_jax_and_flax_alone(path):
  allowed = {'jax', 'flax', 'rvq_jax'} | sys.stdlib_module_names
  assert {name.split('.')[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.name))
def test_nothing_imports_tensorflow_or_pickle(path):
  names = {name.split('.')[0] for name in imported(path)}
  assert not names & {'tensorflow', 'pickle', 'cloudpickle', 'dill'}


def test_launchers_shadow_no_module_of_the_standard_library():
  names = {path.stem for path in (ROOT / 'launch').glob('*.py')}
  assert not names & sys.stdlib_module_names


def test_requirements_are_those_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  listed = {line for line in lines if re.match('[a-zA-Z]', line)}
  extras = project['optional-dependencies']['test']
  assert listed == set(project['dependencies']) | set(extras)
  assert '-e .' in lines
