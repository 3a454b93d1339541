"""A folder that is not a run of ours is refused, and stays as it was."""

import functools
import json
import os
import shutil

import pytest
from errors import one_line

from rvq_jax import load
from rvq_jax.training import loop
from rvq_jax.training.checkpoints import is_run

FOREIGN = [
  {'notes.txt': 'mine'},
  {'config.json': '{"lr": 1}', 'metrics.jsonl': '{"loss": 1}\n'},
  {'metrics.jsonl': '{"step": 900}\n'},
  {'checkpoints/900/default/x': 'of another program'},
  {'checkpoints/900/meta/metadata': '{"epoch": 3}'},
  {'config.json': '[', 'checkpoints/900/metadata': '{}'},
  {'.lock': '', 'tensorboard/events': 'mine'},
]


def content(folder):
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(x.relative_to(folder)): x.read_bytes() for x in files}


@pytest.mark.parametrize('files', FOREIGN)
def test_no_run_starts_in_a_folder_of_another_program(
  files, tiny_config, tmp_path
):
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  before = content(tmp_path)
  with one_line(f'^--workdir: expected .* got {tmp_path}; name another one'):
    loop.train(tiny_config, tmp_path)
  assert content(tmp_path) == before


def test_a_path_that_orbax_cannot_take_is_no_damage(
  tiny_config, tiny_run, tmp_path
):
  folder = tmp_path / os.fsdecode(b'caf\xe9')
  try:
    shutil.copytree(tiny_run, folder)
  except OSError:
    pytest.skip('this file system takes UTF-8 names only')
  for call in (load, functools.partial(loop.train, tiny_config)):
    with one_line('--workdir: expected a path in UTF-8'):
      call(folder)


def test_no_run_starts_in_an_export(tiny_config, exported):
  before = content(exported)
  with one_line('--workdir: expected a new or empty folder, or one that'):
    loop.train(tiny_config, exported)
  assert content(exported) == before


def test_a_run_and_what_is_left_of_one_are_ours(tiny_run, tmp_path):
  run = shutil.copytree(tiny_run, tmp_path / 'run')
  assert is_run(run)
  (run / 'notes.txt').write_text('of the user')
  assert is_run(run)
  (run / 'config.json').unlink()  # its checkpoints tell
  assert is_run(run)
  (run / 'config.json').write_text(json.dumps({'of': 'another'}))
  assert not is_run(run)
  killed = tmp_path / 'killed'
  (killed / 'checkpoints').mkdir(parents=True)
  (killed / '.lock').touch()
  assert is_run(killed)
