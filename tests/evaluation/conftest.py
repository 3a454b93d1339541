"""One evaluated run and its export, shared by all tests of this folder."""

import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='session')
def run(make_tiny_config, tmp_path_factory):
  """An evaluated run with averaged parameters, of the steps 3, 4 and 6."""
  from rvq_jax.evaluation.evaluate import evaluate_run
  from rvq_jax.training.loop import train

  workdir = tmp_path_factory.mktemp('evaluation') / 'run'
  config = make_tiny_config()
  config.keep_checkpoints = 3
  config.optimizer.params_ema = 0.9
  train(config, workdir)
  evaluate_run(workdir)
  return workdir


@pytest.fixture(scope='session')
def shared_export(run, tmp_path_factory):
  from rvq_jax.evaluation.export import export_run

  folder = tmp_path_factory.mktemp('export') / 'export'
  return export_run(run, folder, licence='cc-by-4.0', name='Tiny')


@pytest.fixture
def exported(shared_export, tmp_path):
  """A copy of the export of `run`, to be changed."""
  return shutil.copytree(shared_export, tmp_path / 'export')


@pytest.fixture(scope='session')
def test_images(image_folder):
  """The 11 test images as evaluation sees them, uint8 [11, 16, 16, 3]."""
  paths = sorted((image_folder / 'test').glob('*/*.png'))
  return np.stack([np.asarray(Image.open(path))[:, 2:18] for path in paths])
