"""Whatever happens to the files of a checkpoint, no other bits are loaded."""

import functools
import logging
import os
import re
import shutil

import jax
import numpy as np
import pytest
from errors import one_line
from tiny_step import Run

from rvq_jax import load
from rvq_jax.training import checkpoints as checkpoints_lib
from rvq_jax.training import loop
from rvq_jax.training.checkpoints import Checkpoints

# Orbax reads arrays side by side and reports only one of those that fail.
pytestmark = [
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
  pytest.mark.usefixtures('one_device'),
]
ITEMS = ('model', 'optimizer', 'meta')


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of a run with the steps 3, 4 and 6."""
  return shutil.copytree(tiny_run, tmp_path / 'run')


@pytest.fixture(scope='module')
def template(make_tiny_config):
  return Run(make_tiny_config()).template


@pytest.fixture
def state(template):
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)


@pytest.fixture(scope='module')
def saved(template, tiny_run):
  """Step -> the bits of its state."""
  with Checkpoints(tiny_run, read_only=True) as checkpoints:
    return {
      s: bits(checkpoints.restore(template, s)) for s in checkpoints.steps
    }


def bits(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


# The averages, which `load` reads, lie in the first tenths of a file.
def flip(path, at=0.1, bit=0):
  data = bytearray(path.read_bytes())
  data[int(at * len(data))] ^= 1 << bit
  path.write_bytes(data)


def truncate(path):
  os.truncate(path, path.stat().st_size // 10)


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


def array_file(run):
  """The largest file of the arrays of step 6."""
  files = (run / 'checkpoints/6/model').rglob('d/*')
  return max(files, key=lambda path: path.stat().st_size)


def warnings_of(caplog):
  records = [x for x in caplog.records if x.levelno > logging.INFO]
  return [x.getMessage() for x in records if x.name == 'root']


def assert_sound_or_named(run, template, saved, item, caplog):
  """Reads step 6 in both ways; returns whether damage was noticed."""
  caplog.clear()
  with Checkpoints(run, read_only=True) as checkpoints:
    try:
      assert bits(checkpoints.restore(template, 6)) == saved[6]
      damaged = False
    except ValueError as error:
      line = rf'the checkpoint of step 6 in .* is damaged: {item}.*'
      assert re.fullmatch(line, str(error))
      damaged = True
  with Checkpoints(run) as checkpoints:
    state, meta = checkpoints.restore_newest(template, lambda meta: None)
  assert bits(state) == saved[4 if damaged else 6]
  assert meta['position']['step'] == (4 if damaged else 6)
  assert (run / 'corrupt/6').is_dir() == damaged
  if damaged:
    [warning] = warnings_of(caplog)
    assert f'step 6 in {run}' in warning and f'is damaged: {item}' in warning
    assert 'resuming from step 4' in warning
  return damaged


@pytest.mark.slow
@pytest.mark.parametrize(
  'damages',
  [[functools.partial(flip, at=at) for at in (0, 0.3, 0.7, 0.999)]]
  + [[truncate], [os.remove], [zero]],
)
def test_damage_to_any_file_is_named_or_changes_no_bit(
  damages, tiny_run, tmp_path, template, saved, caplog
):
  arrays, run = [], tmp_path / 'run'  # whether damage to values was noticed
  source = tiny_run / 'checkpoints/6'
  files = [p for p in source.rglob('*') if p.is_file() and p.stat().st_size]
  for i, path in enumerate(sorted(files)):
    name = path.relative_to(source)
    for j, damage in enumerate(damages):
      shutil.rmtree(run, ignore_errors=True)
      shutil.copytree(tiny_run, run)
      options = {'bit': (i + j) % 8} if len(damages) > 1 else {}
      damage(run / 'checkpoints/6' / name, **options)
      item = name.parts[0] if name.parts[0] in ITEMS else ''
      damaged = assert_sound_or_named(run, template, saved, item, caplog)
      arrays += [damaged] if name.parts[1:2] == ('d',) else []
  assert len(arrays) >= 2 and all(arrays)


def test_a_run_resumes_from_the_step_before_and_saves_the_bad_one_anew(
  run, tiny_config, template, saved
):
  flip(array_file(run))
  loop.train(tiny_config, run)
  with Checkpoints(run, read_only=True) as checkpoints:
    assert bits(checkpoints.restore(template, 6)) == saved[6]


def test_what_a_killed_run_left_is_removed(run, template):
  folder = run / 'checkpoints'
  shutil.copytree(folder / '6', folder / '8.orbax-checkpoint-tmp')
  shutil.copytree(folder / '6', folder / '.deleted' / '2')
  with Checkpoints(run) as checkpoints:
    checkpoints.restore_newest(template, lambda meta: None)
    assert checkpoints.steps == [3, 4, 6]
  assert sorted(p.name for p in folder.iterdir()) == ['3', '4', '6']
  assert not (run / 'corrupt').exists()


@pytest.mark.parametrize('again', [False, True])
def test_an_older_step_without_meta_is_named_and_moved(
  run, template, caplog, again
):
  shutil.rmtree(run / 'checkpoints/4/meta')
  if again:
    (run / 'corrupt/4').mkdir(parents=True)
    (run / 'corrupt/4/mine').touch()
  with Checkpoints(run) as checkpoints:
    checkpoints.restore_newest(template, lambda meta: None)
    assert checkpoints.steps == [3, 6]
  [warning] = warnings_of(caplog)
  assert 'step 4' in warning and 'is damaged: meta' in warning
  name = '4-again' if again else '4'
  assert f'moved to {run}/corrupt/{name}, resuming from step 6' in warning
  assert {p.name for p in run.glob(f'corrupt/{name}/*')} >= {'model'}
  assert (run / 'corrupt/4/mine').exists() == again


def test_a_kill_while_a_step_is_deleted_leaves_no_damaged_step(
  run, state, monkeypatch
):
  """An old step leaves the others by one rename."""
  kept = []
  monkeypatch.setattr(checkpoints_lib, '_DELETED', '.kept')
  monkeypatch.setattr(shutil, 'rmtree', lambda path, **_: kept.append(path))
  with Checkpoints(run, keep=1) as checkpoints:
    save(checkpoints, state, 7)
  assert {p.name for p in (run / 'checkpoints/.kept').iterdir()} >= {'4'}
  for step in (run / 'checkpoints/.kept').iterdir():
    assert {p.name for p in step.iterdir()} >= {*ITEMS}


def test_a_run_without_a_sound_step_is_refused_and_left_alone(run, template):
  for step in (3, 4, 6):
    flip(run / f'checkpoints/{step}/meta/metadata')
  before = sorted(run.rglob('*'))
  with Checkpoints(run) as checkpoints, one_line('no .* is sound.*: .*step 4'):
    checkpoints.restore_newest(template, lambda meta: None)
  assert sorted(run.rglob('*')) == before


@pytest.mark.parametrize('damage', [truncate, flip, os.remove])
def test_load_refuses_a_damaged_step_and_names_the_item(damage, run):
  damage(array_file(run))
  for step in (None, 6):
    with one_line('step 6 .* is damaged: model .*found: 3, 4'):
      load(run, step)
  assert load(run, 4).step == 4


def save(checkpoints, state, step, score=None):
  state = state.replace(step=np.int32(step))
  checkpoints.save(state, config={}, position={}, score=score)


def test_the_newest_and_the_best_steps_stay(tmp_path, state):
  scores = {1: 0.3, 2: 0.1, 3: None, 4: float('nan'), 5: 0.2}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step, score in scores.items():
      save(checkpoints, state, step, score)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.resolve('best') == 2
    assert checkpoints.meta(4)['score'] is None
    save(checkpoints, state, 6, 0.05)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps == [5, 6]
    assert checkpoints.resolve('best') == 6
    with one_line(r'step 2 .*steps \[5, 6\]', FileNotFoundError):
      checkpoints.resolve(2)


def test_the_best_step_is_chosen_among_sound_scores(run, state, caplog):
  with Checkpoints(run, read_only=True) as checkpoints:
    best = checkpoints.resolve('best')
  other = {3: 6, 6: 3}[best]
  flip(run / f'checkpoints/{best}/meta/metadata')
  with Checkpoints(run, keep=1) as checkpoints:
    assert checkpoints.resolve('best') == other
    for step in (7, 8):
      save(checkpoints, state, step)
  [warning] = warnings_of(caplog)
  assert f'step {best}' in warning and 'meta' in warning
  assert {*os.listdir(run / 'checkpoints')} == {str(other), '8'}


def test_a_save_that_orbax_declines_is_an_error(tmp_path, state, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save', lambda *a, **k: False)
    with one_line('step 0 was not saved', RuntimeError):
      save(checkpoints, state, 0)
