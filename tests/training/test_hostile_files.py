"""Files that somebody left in a workdir are never executed."""

import ast
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from rvq_jax import load
from rvq_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
metrics.jsonl config.json .lock checkpoints/7/model/checkpoint
checkpoints/6/meta/metadata checkpoints/6/model/x.pkl
""".split()


class Bomb(str):
  """The path of a folder that is made when it is unpickled."""

  def __reduce__(self):
    return os.mkdir, (str(self),)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize(
  'name',
  ['state.pkl', 'checkpoints/6/model/_METADATA']
  + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW],
)
def test_a_pickle_in_the_workdir_is_never_loaded(
  name, tiny_run, tmp_path, tiny_config
):
  run = shutil.copytree(tiny_run, tmp_path / 'run')
  (run / name).parent.mkdir(parents=True, exist_ok=True)
  (run / name).write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
  for use in (lambda: load(run), lambda: loop.train(tiny_config, run)):
    try:
      use()
    except (ValueError, OSError) as error:
      assert '\n' not in str(error)
  assert not (tmp_path / 'boom').exists()


def test_numpy_never_unpickles():
  folders = ('rvq_jax', 'launch', 'benchmarks', 'configs')
  paths = (x for folder in folders for x in (ROOT / folder).rglob('*.py'))
  nodes = (x for path in paths for x in ast.walk(ast.parse(path.read_text())))
  calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
  calls = [x for x in calls if re.match(r'(np|numpy)\.(load|save)\(', x)]
  assert len(calls) >= 2
  assert [call for call in calls if 'allow_pickle=False' not in call] == []
