"""The rules of the house: imports point strictly down, sizes stay small."""

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
TREES = {
  str(path.relative_to(ROOT / 'rvq_jax')): ast.parse(path.read_text())
  for path in sorted((ROOT / 'rvq_jax').rglob('*.py'))
}
MAX_LINES, MAX_FUNCTION, MAX_STEP = 300, 60, 45
SECTIONS = re.compile(r'(data|model|objective|optimizer)\.\w+')
READS_THE_CONFIG = {f'training/{x}.py' for x in ('config', 'build', 'loop')}


def module_name(file):
  parts = ('rvq_jax', *Path(file).with_suffix('').parts)
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(file) for file in TREES}


def imported(tree):
  """Names that a file imports: anywhere in it, also by importlib strings."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in MODULES else node.module
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      module = node.value if node.value in MODULES else None
      module = module or node.value.rpartition('.')[0]  # or of a class in one
      if module in MODULES - {'rvq_jax'}:
        yield module


IMPORTED = {module_name(file): {*imported(TREES[file])} for file in TREES}


def package(module):
  parts = module.split('.')
  return parts[1] if len(parts) > 1 else '__init__'


def ours(names):
  return {name for name in names if name.split('.')[0] == 'rvq_jax'}


def nodes(kind):
  """(file, node) of a kind, in all files."""
  for file, tree in TREES.items():
    yield from ((file, x) for x in ast.walk(tree) if isinstance(x, kind))


def is_put_together(node):
  """Whether an expression makes a string of parts."""
  kinds = ast.JoinedStr | ast.BinOp
  return any(
    isinstance(x, kinds)
    or (isinstance(x, ast.Attribute) and x.attr == 'format')
    for x in ast.walk(node)
  )


def test_imports_point_strictly_down():
  for module, names in IMPORTED.items():
    for name in ours(names):
      here, there = package(module), package(name)
      assert here == there or LAYERS[there] < LAYERS[here], (module, name)


def test_no_file_is_imported_in_a_circle():
  try:
    TopologicalSorter(
      {m: ours(names) for m, names in IMPORTED.items()}
    ).prepare()
  except CycleError as error:
    pytest.fail(' -> '.join(error.args[1]))


def test_imports_by_string_are_seen():
  tree = ast.parse(
    'def f():\n  import rvq_jax.metrics\n'
    "  importlib.import_module('rvq_jax.data.splits')\n"
    "NAMES = {'x': 'rvq_jax.models.vqvae.VQVAE'}\n"
  )
  names = {'metrics', 'data.splits', 'models.vqvae'}
  assert set(imported(tree)) == {f'rvq_jax.{name}' for name in names}


def test_third_party_imports_are_those_of_the_layer():
  # JAX itself needs NumPy.
  allowed = {'quantize': {'jax', 'flax', 'numpy'}, 'metrics': {'jax', 'numpy'}}
  for module, names in IMPORTED.items():
    roots = {name.split('.')[0] for name in names} - {'rvq_jax'}
    assert not roots & {'tensorflow', 'pickle', 'cloudpickle', 'dill'}, module
    if package(module) in allowed:
      foreign = roots - allowed[package(module)]
      assert foreign <= sys.stdlib_module_names, module


def test_no_name_is_put_together_from_strings():
  for file, call in nodes(ast.Call):
    function = ast.unparse(call.func)
    if function == 'getattr' or function.endswith('import_module'):
      assert not any(map(is_put_together, call.args)), f'{file}:{call.lineno}'


def test_only_config_build_and_loop_read_a_flat_config():
  for file, node in nodes(ast.Subscript):
    key = getattr(node.slice, 'value', None)
    if isinstance(key, str) and SECTIONS.fullmatch(key):
      assert file in READS_THE_CONFIG, f'{file}:{node.lineno} {key}'


def test_no_file_is_too_long():
  for file in TREES:
    lines = (ROOT / 'rvq_jax' / file).read_text().splitlines()
    assert len(lines) <= MAX_LINES, file


def length(function):
  """Lines of a function without its docstring."""
  doc = function.body[0] if ast.get_docstring(function) is not None else None
  lines = (x.end_lineno - x.lineno + 1 for x in (function, doc) if x)
  return next(lines) - next(lines, 0)


def test_no_function_is_too_long():
  for file, function in nodes(ast.FunctionDef):
    assert length(function) <= MAX_FUNCTION, f'{file} {function.name}'


def test_the_train_step_is_short():
  (step,) = (
    function
    for file, function in nodes(ast.FunctionDef)
    if file == 'training/step.py' and function.name == '__call__'
  )
  assert length(step) <= MAX_STEP


def test_launchers_are_short_and_shadow_no_standard_module():
  for path in (ROOT / 'launch').glob('*.py'):
    assert len(path.read_text().splitlines()) <= 8, path.name
    assert path.stem not in sys.stdlib_module_names


def test_requirements_are_the_dependencies_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  listed = {line for line in lines if re.match('[a-zA-Z]', line)}
  assert listed == set(project['dependencies'])
