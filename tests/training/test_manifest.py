"""A damaged checkpoint is found, named, and never loaded."""

import logging
import os
import shutil
import subprocess

import numpy as np
import pytest

from rvq_jax import load
from rvq_jax.training import loop, manifest
from rvq_jax.training.checkpoints import Checkpoints


@pytest.fixture
def run(tiny_run, tmp_path):
  return shutil.copytree(tiny_run, tmp_path / 'run')


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


def flip(path, at=0.5, bit=0):
  data = bytearray(path.read_bytes())
  data[int(at * len(data))] ^= 1 << bit
  path.write_bytes(data)


def array_file(run, item='model'):
  """The largest file of the arrays of step 6."""
  files = (run / 'checkpoints/6' / item).rglob('d/*')
  return max(files, key=lambda path: path.stat().st_size)


def test_every_step_of_a_run_is_sealed(tiny_run):
  for step in manifest.steps(tiny_run / 'checkpoints'):
    assert manifest.fault(tiny_run / f'checkpoints/{step}') is None


@pytest.mark.skipif(not shutil.which('sha256sum'), reason='no coreutils')
def test_coreutils_agrees_with_the_sums(tiny_run):
  done = subprocess.run(
    ['sha256sum', '--check', '--strict', '--quiet', manifest.NAME],
    cwd=tiny_run / 'checkpoints/6',
  )
  assert done.returncode == 0


def test_one_flipped_bit_anywhere_is_found(run):
  step = run / 'checkpoints/6'
  rng = np.random.default_rng(0)
  files = [path for path in step.rglob('*') if path.stat().st_size]
  for path in filter(lambda path: path.is_file(), files):
    kept = path.read_bytes()
    for at in rng.uniform(size=4):
      flip(path, at, int(rng.integers(8)))
      assert manifest.fault(step), f'{path} at {at}'
    path.write_bytes(kept)
  assert manifest.fault(step) is None


@pytest.mark.parametrize('damage', [truncate, zero, flip, os.remove])
@pytest.mark.parametrize('item', ['model', 'optimizer'])
def test_a_damaged_newest_step_gives_way_to_the_one_before(
  damage, item, run, caplog
):
  path = array_file(run, item)
  damage(path)
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step == 4
  [warning] = [r.message for r in caplog.records if r.levelno > logging.INFO]
  name = path.relative_to(run / 'checkpoints/6').as_posix()
  assert 'step 6 is damaged' in warning and name in warning
  assert 'going on from step 4' in warning
  assert (run / 'corrupt/6').is_dir()


@pytest.mark.parametrize('name', [manifest.NAME, 'meta/metadata', 'metrics'])
def test_every_part_of_a_step_counts(name, run, caplog):
  path = run / 'checkpoints/6' / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step == 4
  assert 'step 6 is damaged' in caplog.text and name in caplog.text


def test_an_empty_newest_step_gives_way_to_the_one_before(run, caplog):
  (run / 'checkpoints/9').mkdir()
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step == 6
  assert 'step 9 is damaged: it is empty' in caplog.text


def test_a_run_goes_on_from_the_step_before_and_saves_the_bad_one_anew(
  run, tiny_config
):
  flip(array_file(run))
  loop.train(tiny_config, run)
  step = run / 'checkpoints/6'
  assert manifest.fault(step) is None
  assert manifest.fault(run / 'corrupt/6')


def test_left_overs_of_a_killed_run_are_removed(run):
  folder = run / 'checkpoints'
  for name in ('8.orbax-checkpoint-tmp', '8.orbax-checkpoint-tmp-sealed'):
    shutil.copytree(folder / '6', folder / name)
  (folder / '4/model/manifest.ocdbt').unlink()  # half deleted
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step == 6
  assert sorted(p.name for p in folder.iterdir()) == ['3', '6']
  assert not (run / 'corrupt').exists()


def unreadable(path):
  path.unlink()
  path.symlink_to(path.name)  # to itself: not even root can read it


def rename_listed(path):
  flip(path, at=path.read_bytes().index(b'METADATA') / path.stat().st_size)


@pytest.mark.parametrize(
  'damage', [truncate, zero, os.remove, unreadable, rename_listed]
)
def test_an_older_step_whose_sums_are_damaged_is_kept_aside(
  damage, run, caplog
):
  step = run / 'checkpoints/4'
  arrays = sorted((p.name, p.read_bytes()) for p in step.rglob('d/*'))
  damage(step / manifest.NAME)
  with Checkpoints(run) as checkpoints:
    assert checkpoints.steps == [3, 6]
  [warning] = [r.message for r in caplog.records if r.levelno > logging.INFO]
  assert 'step 4 is damaged' in warning and str(run / 'corrupt/4') in warning
  aside = (run / 'corrupt/4').rglob('d/*')
  assert sorted((p.name, p.read_bytes()) for p in aside) == arrays


def test_a_half_deleted_step_without_its_sums_is_removed(run):
  step = run / 'checkpoints/4'
  (step / manifest.NAME).unlink()
  shutil.rmtree(step / 'optimizer')
  with Checkpoints(run) as checkpoints:
    assert checkpoints.steps == [3, 6]
  assert not step.exists() and not (run / 'corrupt').exists()


def test_a_file_that_cannot_be_read_is_named(run):
  unreadable(array_file(run))
  assert 'cannot be read' in manifest.fault(run / 'checkpoints/6')
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step == 4


def test_scores_of_an_older_step_are_checked_before_they_are_read(run, caplog):
  zero(run / 'checkpoints/3/metrics/metrics')
  with Checkpoints(run) as checkpoints:
    assert checkpoints.steps == [4, 6]
  assert 'step 3 is damaged: metrics/metrics' in caplog.text


def test_a_run_without_an_intact_step_is_refused_and_left_alone(run):
  for step in manifest.steps(run / 'checkpoints'):
    flip(run / f'checkpoints/{step}/meta/metadata')
  before = sorted(run.rglob('*'))
  with pytest.raises(ValueError, match='no checkpoint') as error:
    Checkpoints(run)
  assert '\n' not in str(error.value) and 'step 6: meta' in str(error.value)
  assert sorted(run.rglob('*')) == before


@pytest.mark.parametrize('damage', [truncate, zero, flip, os.remove])
def test_load_refuses_a_damaged_step_and_names_the_file(damage, run):
  path = array_file(run)
  damage(path)
  for step in (None, 6):
    with pytest.raises(ValueError, match='step 6 .* is damaged') as error:
      load(run, step)
    assert path.name in str(error.value) and '\n' not in str(error.value)
  assert load(run, 4).step == 4


def test_load_refuses_damaged_scores(run):
  path = run / 'checkpoints/3/metrics/metrics'
  kept = path.read_bytes()
  digit = kept.index(b'"mse":') + 10  # another number, but still a number
  flip(path, at=(digit + 0.5) / len(kept))
  with pytest.raises(ValueError, match='step 3 .*metrics/metrics'):
    load(run, 'best')
  assert load(run).step == 6
  zero(path)
  with pytest.raises(ValueError, match='step 3 .*metrics/metrics'):
    load(run)
