"""One evaluated run and its export, shared by all tests of this folder."""

import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def on_one_device(one_device):
  """Evaluation on several is a test of its own."""


@pytest.fixture(scope='session')
def run(tiny_run, make_once, tmp_path_factory):
  """An evaluated run with averaged parameters, of the steps 3, 4 and 6."""
  from rvq_jax.evaluation.evaluate import evaluate_run

  def evaluated(folder):
    shutil.copytree(tiny_run, folder)
    evaluate_run(folder)

  folder = tmp_path_factory.mktemp('evaluation') / 'run'
  return shutil.copytree(make_once('evaluated', evaluated), folder)


@pytest.fixture(scope='session')
def shared_export(run, make_once):
  from rvq_jax.evaluation.export import export_run

  about = {'licence': 'cc-by-4.0', 'name': 'Tiny'}
  return make_once('export', lambda folder: export_run(run, folder, **about))


@pytest.fixture
def exported(shared_export, tmp_path):
  """A copy of the export of `run`, to be changed."""
  return shutil.copytree(shared_export, tmp_path / 'export')


@pytest.fixture(scope='session')
def test_images(image_folder):
  """The 11 test images as evaluation sees them, uint8 [11, 16, 16, 3]."""
  paths = sorted((image_folder / 'test').glob('*/*.png'))
  return np.stack([np.asarray(Image.open(path))[:, 2:18] for path in paths])
