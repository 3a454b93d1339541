"""A run that resumes elsewhere: other devices, workers or config."""

import shutil

import pytest
from errors import one_line
from PIL import Image

from rvq_jax import load
from rvq_jax.training import checkpoints, loop
from rvq_jax.training.checkpoints import Checkpoints


@pytest.mark.slow
def test_one_device_resumes_as_eight_from_the_same_bits(
  start_run, tiny_config, tmp_path, final_bits, log_of
):
  tiny_config.optimizer.schedule = 'constant'  # so that a run may get longer
  tiny_config.num_steps = 4
  run, whole = tmp_path / 'run', tmp_path / 'whole'
  start_run(run).end()
  saved = final_bits(tiny_config, run)
  tiny_config.num_steps = 12
  start_run(whole).end()
  assert final_bits(tiny_config, run) == saved
  loop.train(tiny_config, run)
  one, eight = log_of(whole), log_of(run)
  for step in range(1, 13):
    key = (step, 'train/mse')
    assert eight[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_another_number_of_workers_is_exact(tiny_config, tmp_path, final_bits):
  tiny_config.data.crop = 'random_resized'
  tiny_config.optimizer.schedule = 'constant'
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  tiny_config.num_steps = 3
  loop.train(tiny_config, parts)
  tiny_config.num_steps = 7
  loop.train(tiny_config, whole)
  tiny_config.data.num_workers = 2
  loop.train(tiny_config, parts)
  assert final_bits(tiny_config, parts) == final_bits(tiny_config, whole)


@pytest.mark.usefixtures('one_device')
def test_a_run_goes_on_with_its_images_wherever_they_lie(
  tiny_config, tiny_run, image_folder, tmp_path, monkeypatch
):
  run = shutil.copytree(tiny_run, tmp_path / 'run')
  moved = shutil.copytree(image_folder, tmp_path / 'moved')
  loop.train(tiny_config, run)
  tiny_config.data.name = f'folder:{moved}'
  loop.train(tiny_config, run)
  for path in moved.glob('*/*/*'):
    Image.new('RGB', (20, 16)).save(path)
  for name in (moved, tmp_path / 'none'):
    tiny_config.data.name = f'folder:{name}'
    with one_line('of the run are missing or changed|No such file'):
      loop.train(tiny_config, run)
  (run / 'split.json').unlink()  # of an earlier version
  tiny_config.data.name = f'folder:{moved}'
  with one_line(f"config.data.name: checkpoint 'folder:{image_folder}'"):
    loop.train(tiny_config, run)


@pytest.mark.parametrize(
  ('name', 'value'),
  [('codebook_size', 32), ('code_dim', 8), ('widths', (8, 8))],
)
def test_another_model_is_refused_before_anything_is_loaded(
  name, value, tiny_run, tiny_config, monkeypatch
):
  tiny_config.model[name] = value
  monkeypatch.setattr(Checkpoints, 'restore', None)
  with one_line(f'model.{name}: checkpoint '):
    loop.train(tiny_config, tiny_run)


def test_arrays_of_another_version_open_and_are_not_resumed(
  tiny_run, tiny_config, monkeypatch
):
  monkeypatch.setattr(checkpoints, '_LAYOUT', 1)
  with one_line('another version .*cannot be resumed'):
    loop.train(tiny_config, tiny_run)
  assert load(tiny_run).step == 6
