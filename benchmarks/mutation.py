"""Mutation testing: do the tests notice a fault drawn at random?

Draws faults from all possible ones in the modules below, makes each in a
copy of the repository and runs the tests of its folder, then tests/training.
A fault counts as noticed when a test fails within --limit seconds.

  python benchmarks/mutation.py --count=60 --output=faults.jsonl  # or resume
"""

import ast
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = common.ROOT
# Modules (or folders of them) -> tests, the fastest and nearest first.
TRAINING = [
  *(f'tests/training/test_{x}.py' for x in ('config_wiring', 'optimizer')),
  *('tests/training/test_step_gradient.py', 'tests/training'),
]
TARGETS = {
  'rvq_jax/quantize': ['tests/quantize', *TRAINING],
  'rvq_jax/models': ['tests/models', *TRAINING],
  'rvq_jax/training/step.py': ['tests/training/test_step.py', *TRAINING],
  'rvq_jax/training/config.py': ['tests/training/test_config.py', *TRAINING],
  'rvq_jax/metrics.py': [
    *('tests/test_metrics.py', 'tests/evaluation/test_evaluate.py'),
    *TRAINING,
  ],
}
SWAPS = {
  **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
  **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
  **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or},
  **{ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE},
  **{ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn},
  **{ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}
Fault = collections.namedtuple('Fault', 'file place kind before after source')


def _expressions(node):
  """(kind, changed node) for the ways to spoil one node."""
  if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
    if type(node.op) in SWAPS:
      yield 'operator', {'op': SWAPS[type(node.op)]()}
  if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
    swapped = SWAPS[type(node.ops[0])]()
    yield 'comparison', {'ops': [swapped, *node.ops[1:]]}
  if isinstance(node, ast.Constant) and not isinstance(node.value, str | bytes):
    if isinstance(node.value, bool):
      yield 'constant', {'value': not node.value}
    elif isinstance(node.value, int | float):
      yield 'constant', {'value': node.value + 1}
    elif node.value is None:
      yield 'constant', {'value': 0}
  if isinstance(node, ast.Call):
    for keyword in node.keywords:
      rest = [k for k in node.keywords if k is not keyword]
      yield f'argument {keyword.arg}', {'keywords': rest}
  if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
    if len(node.value.elts) > 1:
      first, second, *rest = node.value.elts
      yield 'return', {'value': ast.Tuple([second, first, *rest], ast.Load())}


def _replacements(node):
  """(kind, node to replace, its replacement) for one node."""
  for kind, fields in _expressions(node):
    old = {name: getattr(node, name) for name in node._fields}
    yield kind, node, type(node)(**old | fields)
  if isinstance(node, ast.If | ast.IfExp | ast.While):
    yield 'condition', node.test, ast.UnaryOp(ast.Not(), node.test)
  if isinstance(node, ast.UnaryOp):
    yield 'operator', node, node.operand
  if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr):
    yield 'statement', node, ast.Pass()


def _visible(node):
  """Walks a tree without docstrings, messages, annotations and asserts."""
  yield node
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns'):
      continue
    for child in value if isinstance(value, list) else [value]:
      text = isinstance(child, ast.Expr) and isinstance(
        child.value, ast.Constant | ast.JoinedStr
      )
      hidden = isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr)
      if isinstance(child, ast.AST) and not text and not hidden:
        yield from _visible(child)


def _faults(path: Path):
  """All possible faults in a module."""
  text = path.read_bytes()
  starts = [0]
  for line in text.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
  where = str(path.relative_to(ROOT))
  for node in _visible(ast.parse(text)):
    for kind, old, new in _replacements(node):
      first = starts[old.lineno - 1] + old.col_offset
      last = starts[old.end_lineno - 1] + old.end_col_offset
      after = ast.unparse(ast.fix_missing_locations(new))
      code = f'({after})' if isinstance(new, ast.expr) else after
      source = text[:first] + code.encode() + text[last:]
      before = text[first:last].decode()
      short = [' '.join(x.split())[:60] for x in (before, after)]
      place = f'{old.lineno}:{old.col_offset}'
      yield Fault(where, place, kind, *short, source)


def _ordered(module: Path, tests: list[str]) -> list[str]:
  """Test files; in a folder, those that name most of the module first."""
  tree = ast.parse(module.read_text())
  names = [node.name for node in tree.body if hasattr(node, 'name')]

  def strangeness(path):
    text = path.read_text()
    namesake = path.name == f'test_{module.stem}.py'
    return not namesake, -sum(name in text for name in names), path

  files = []
  for test in tests:
    path = ROOT / test
    assert path.exists(), f'{path}: a missing test would notice every fault'
    inside = path.glob('test_*.py') if path.is_dir() else [path]
    files += sorted(inside, key=strangeness)
  return list(dict.fromkeys(str(file.relative_to(ROOT)) for file in files))


def draw(count: int, seed: int) -> list[tuple[Fault, list[str]]]:
  """Faults drawn uniformly, each with its tests."""
  faults = []
  for target, tests in TARGETS.items():
    path = ROOT / target
    for module in sorted(path.glob('*.py')) if path.is_dir() else [path]:
      files = _ordered(module, tests)
      faults += [(fault, files) for fault in _faults(module)]
  return random.Random(seed).sample(faults, min(count, len(faults)))


def notice(fault: Fault, tests: list[str], limit: float) -> str | None:
  """The test that fails on a fault within the limit, or None."""
  with tempfile.TemporaryDirectory() as folder:
    hidden = shutil.ignore_patterns('.git', '__pycache__', '.*_cache')
    copy = shutil.copytree(ROOT, Path(folder) / 'copy', ignore=hidden)
    (copy / fault.file).write_bytes(fault.source)
    command = [sys.executable, '-m', 'pytest', '-x', '-n0', '--tb=no']
    process = subprocess.Popen(
      [*command, '-p', 'no:cacheprovider', '--durations=0', *tests],
      cwd=copy,
      env=os.environ | {'PYTHONPATH': str(copy)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    try:
      output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
      return None
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  failed = re.search(r'^(?:FAILED|ERROR) (\S+)', output, re.MULTILINE)
  if process.returncode:
    return failed[1] if failed else 'collection'
  return None


def main():
  """Draws, runs and counts."""
  args = common.parser(
    __doc__, count=60, seed=0, jobs=1, limit=60.0, output='faults.jsonl'
  ).parse_args()
  records = common.read_records(args.output)
  done = {tuple(r['fault']): r['noticed'] for r in records}

  def run(drawn):
    fault, tests = drawn
    name = fault[:5]
    if name not in done:
      start = time.monotonic()
      done[name] = notice(fault, tests, args.limit)
      seconds = round(time.monotonic() - start)
      with open(args.output, 'a') as file:
        record = {'fault': name, 'noticed': done[name], 'seconds': seconds}
        file.write(json.dumps(record) + '\n')
    by = done[name]
    result = f'noticed by {by}' if by else 'survived'
    file, place, kind, before, after = name
    print(f'{file}:{place} {kind} {before} -> {after}: {result}', flush=True)
    return by is not None

  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    noticed = list(pool.map(run, draw(args.count, args.seed)))
  print(f'{sum(noticed)} of {len(noticed)} noticed')


if __name__ == '__main__':
  main()
