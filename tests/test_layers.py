"""The rules of the house: imports point strictly down, requirements agree."""

import ast
import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
  'io': 0,
  'metrics': 0,
  'sharding': 0,
  'quantize': 1,
  'models': 2,
  'data': 2,
  'training': 3,
  'tokenizer': 4,
  'evaluation': 5,
  'paper': 6,
  'explorer': 6,
  'commands': 7,
  'cli': 8,
  '__init__': 9,
}
SOURCES = sorted((ROOT / 'rvq_jax').rglob('*.py'))
MAX_LINES = 300


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path) for path in SOURCES}


def imported(path):
  """Names that a file imports: anywhere in it, also by importlib strings."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in MODULES else node.module
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      module = node.value if node.value in MODULES else None
      module = module or node.value.rpartition('.')[0]  # or of a class in one
      if module in MODULES - {'rvq_jax'}:
        yield module


def ours(path):
  return {name for name in imported(path) if name.split('.')[0] == 'rvq_jax'}


def package(module):
  parts = module.split('.')
  return parts[1] if len(parts) > 1 else '__init__'


@pytest.mark.parametrize('path', SOURCES, ids=module_name)
def test_imports_point_strictly_down(path):
  own = package(module_name(path))
  for name in ours(path):
    other = package(name)
    assert other == own or LAYERS[other] < LAYERS[own], name


def test_no_file_is_imported_in_a_circle():
  graph = {module_name(path): ours(path) for path in SOURCES}
  try:
    TopologicalSorter(graph).prepare()
  except CycleError as error:
    pytest.fail(' -> '.join(error.args[1]))


def test_imports_by_string_are_seen(tmp_path):
  file = tmp_path / 'x.py'
  file.write_text(
    'def f():\n  import rvq_jax.metrics\n'
    "  importlib.import_module('rvq_jax.data.splits')\n"
    "NAMES = {'x': 'rvq_jax.models.vqvae.VQVAE'}\n"
  )
  assert set(imported(file)) == {
    'rvq_jax.metrics',
    'rvq_jax.data.splits',
    'rvq_jax.models.vqvae',
  }


def test_importlib_is_given_whole_names():
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and 'import_module' in ast.dump(node.func):
        assert not any(
          isinstance(x, ast.JoinedStr | ast.BinOp) for x in ast.walk(node)
        ), f'{path}: a name that is put together hides an import'


@pytest.mark.parametrize('path', SOURCES, ids=module_name)
def test_no_file_is_too_long(path):
  # What others open in PyTorch is one file, whatever it holds.
  more = 50 * (path.name == 'tokenizer_torch.py')
  assert len(path.read_text().splitlines()) <= MAX_LINES + more


@pytest.mark.parametrize('path', SOURCES, ids=module_name)
def test_third_party_imports_are_those_of_the_layer(path):
  names = {name.split('.')[0] for name in imported(path)}
  assert not names & {'tensorflow', 'pickle', 'cloudpickle', 'dill'}
  allowed = {
    'quantize': {'jax', 'flax', 'numpy'},  # JAX itself needs NumPy
    'metrics': {'jax', 'numpy'},
  }.get(package(module_name(path)))
  if allowed:
    assert names - {'rvq_jax'} <= allowed | sys.stdlib_module_names


def test_train_step_is_short():
  tree = ast.parse((ROOT / 'rvq_jax/training/step.py').read_text())
  (step,) = (
    method
    for node in tree.body
    for method in getattr(node, 'body', ())
    if isinstance(method, ast.FunctionDef) and method.name == '__call__'
  )
  assert step.end_lineno - step.lineno + 1 <= 45


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'launch').glob('*.py')), ids=lambda p: p.name
)
def test_launchers_are_short_and_shadow_no_standard_module(path):
  assert len(path.read_text().splitlines()) <= 80
  assert path.stem not in sys.stdlib_module_names


def test_requirements_are_the_dependencies_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  listed = {line for line in lines if re.match('[a-zA-Z]', line)}
  assert listed == set(project['dependencies'])
