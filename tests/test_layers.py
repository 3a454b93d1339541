"""The rules of the house: imports point strictly down, sizes stay small."""

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
  *('io metrics sharding', 'quantize', 'models data', 'training', 'tokenizer'),
  *('evaluation', 'paper explorer', 'commands', 'cli', '__init__'),
]
LAYERS = {name: i for i, names in enumerate(ORDER) for name in names.split()}
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
  return {name for name in names if name.partition('.')[0] == 'rvq_jax'}


def nodes(kind):
  """(file, node) of a kind, in all files."""
  for file, tree in TREES.items():
    yield from ((file, x) for x in ast.walk(tree) if isinstance(x, kind))


def is_put_together(node):
  """Whether an expression makes a string of parts."""
  return any(
    isinstance(x, ast.JoinedStr | ast.BinOp)
    or getattr(x, 'attr', '') == 'format'
    for x in ast.walk(node)
  )


def test_imports_point_strictly_down():
  # Seen are also names of modules and of classes, and imports in a function.
  assert 'rvq_jax.models.vqvae' in IMPORTED['rvq_jax']
  assert 'rvq_jax.quantize.fsq' in IMPORTED['rvq_jax.quantize.registry']
  assert 'rvq_jax.training.backend' in IMPORTED['rvq_jax.commands.program']
  for module, names in IMPORTED.items():
    for name in ours(names):
      here, there = package(module), package(name)
      assert here == there or LAYERS[there] < LAYERS[here], (module, name)


def test_no_file_is_imported_in_a_circle():
  graph = {module: ours(names) for module, names in IMPORTED.items()}
  TopologicalSorter(graph).prepare()  # an error names the circle


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


def test_messages_name_what_an_installed_reader_has():
  # Also the help, which is the docstring of a command, and the model card.
  texts = [(ROOT / 'rvq_jax/tokenizer/card.md').read_text()]
  docs = {id(node.value) for _, node in nodes(ast.Expr)}
  for _, node in nodes(ast.Constant):
    if isinstance(node.value, str) and id(node) not in docs:
      texts.append(node.value)
  for file, tree in TREES.items():
    texts += [ast.get_docstring(tree)] * file.startswith('commands/')
  for text in filter(None, texts):
    assert not re.search(r'launch/|configs/\w|docs/|rvq_jax\[|\bextra `', text)


def test_no_file_is_too_long():
  for file in TREES:
    lines = (ROOT / 'rvq_jax' / file).read_text().splitlines()
    assert len(lines) <= MAX_LINES, file


def test_no_function_is_too_long():
  limits = {'training/step.py __call__': MAX_STEP}
  for file, function in nodes(ast.FunctionDef):
    lines, name = function.end_lineno - function.lineno + 1, function.name
    if ast.get_docstring(function) is not None:
      lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    limit = limits.pop(f'{file} {name}', MAX_FUNCTION)
    assert lines <= limit, f'{file} {name}'
  assert not limits


def test_requirements_are_the_dependencies_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  listed = {line for line in lines if re.match('[a-zA-Z]', line)}
  assert listed == set(project['dependencies'])
