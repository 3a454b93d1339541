"""Files that somebody left in a workdir are never executed."""

import ast
import os
import pickle
import shutil
from pathlib import Path

import pytest

from rvq_jax import load
from rvq_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
  path
  for folder in ('rvq_jax', 'launch', 'benchmarks', 'configs')
  for path in sorted((ROOT / folder).rglob('*.py'))
]


class Bomb:
  """Touches a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def plant(path, bomb):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pickle.dumps(bomb))


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize(
  'name',
  [
    'state.pkl',
    'checkpoints/6/model/_METADATA',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in (
        'metrics.jsonl',
        'config.json',
        '.lock',
        'checkpoints/7/model/checkpoint',
        'checkpoints/6/meta/metadata',
        'checkpoints/6/model/x.pkl',
      )
    ),
  ],
)
def test_a_pickle_in_the_workdir_is_never_loaded(
  name, tiny_run, tmp_path, tiny_config
):
  run = shutil.copytree(tiny_run, tmp_path / 'run')
  plant(run / name, Bomb(tmp_path / 'boom'))
  for use in (lambda: load(run), lambda: loop.train(tiny_config, run)):
    try:
      use()
    except (ValueError, OSError) as error:
      assert '\n' not in str(error)  # refused, in one line
  assert not (tmp_path / 'boom').exists()


def test_numpy_never_unpickles():
  found = 0
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        'np.load',
        'numpy.load',
        'np.save',
      ):
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert options.get('allow_pickle') == 'False', f'{path}:{node.lineno}'
        found += 1
  assert found >= 2
