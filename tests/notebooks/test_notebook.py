"""The notebook is what its source makes, with pictures, and it runs."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jupytext
import numpy as np
import pytest
import skimage.data
from doc_blocks import AS_A_USER
from errors import one_line
from PIL import Image

from rvq_jax.configs import photos
from rvq_jax.data.transforms import decode_image
from rvq_jax.tokenizer.export import export_run
from rvq_jax.training import config as config_lib
from rvq_jax.training import loop

NOTEBOOKS = Path(__file__).resolve().parents[2] / 'notebooks'
STORED = NOTEBOOKS / 'rvq_jax.ipynb'


def load(path):
  return json.loads(path.read_text())['cells']


def pictures(cells):
  outputs = [x for cell in cells for x in cell.get('outputs', ())]
  return ['image/jpeg' in x.get('data', {}) for x in outputs].count(True)


def test_the_stored_notebook_is_that_of_its_source():
  source = jupytext.read(NOTEBOOKS / 'tour.py').cells
  stored = [(x['cell_type'], ''.join(x['source'])) for x in load(STORED)]
  assert stored == [(x.cell_type, x.source) for x in source]


def test_the_stored_notebook_shows_its_pictures_and_no_error():
  cells = load(STORED)
  outputs = [x for cell in cells for x in cell.get('outputs', ())]
  assert pictures(cells) == 9
  assert all(x['output_type'] != 'error' for x in outputs)
  text = json.dumps(outputs)
  assert '| 800/800 [' in text and 'uint16 ids (400, 16, 16)' in text
  assert str(NOTEBOOKS.parent) not in text and str(Path.home()) not in text
  assert all(len(json.dumps(x)) < 3e5 for x in outputs)


def execute(output, tmp_path, **variables):
  """Runs the notebook and returns its cells."""
  variables |= AS_A_USER | {'JAX_PLATFORMS': 'cpu'}
  variables |= {'RVQ_JAX_STEPS': '24', 'RVQ_JAX_WORKDIR': f'{tmp_path}/run'}
  variables['TFDS_DATA_DIR'] = f'{tmp_path}/data'
  command = [sys.executable, NOTEBOOKS / 'execute.py', output]
  env = os.environ | variables
  subprocess.run(command, env=env, check=True, timeout=900)
  return load(output)


@pytest.mark.slow
def test_the_notebook_runs_in_short(tmp_path):
  cells = execute(tmp_path / 'short.ipynb', tmp_path)
  assert pictures(cells) == 9
  assert '| 24/24 [' in json.dumps(cells)


@pytest.mark.slow
def test_the_notebook_shows_an_export_with_two_codes_per_position(
  tiny_config, tmp_path
):
  model = {'quantizer': 'residual', 'depth': 2, 'codebook_size': 200}
  tiny_config.model.update(model)
  loop.train(tiny_config, tmp_path / 'trained')
  export_run(tmp_path / 'trained', tmp_path / 'export')
  run = str(tmp_path / 'export')
  cells = execute(tmp_path / 'shown.ipynb', tmp_path, RVQ_JAX_RUN=run)
  assert pictures(cells) == 8
  outputs = json.dumps([cell.get('outputs') for cell in cells])
  assert '(16, 16, 3) -> ids (4, 4, 2), each one of 200' in outputs
  assert '| 24/24 [' not in outputs
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_the_first_cell_finds_its_clone_after_a_restart(tmp_path, monkeypatch):
  """It does not clone again, which would fail."""
  [first, *_] = (x for x in load(STORED) if x['cell_type'] == 'code')
  (tmp_path / 'rvq_jax' / 'configs').mkdir(parents=True)
  (tmp_path / 'rvq_jax' / 'configs' / 'photos.py').write_text('')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  exec(''.join(first['source']), {})
  assert Path.cwd() == tmp_path / 'rvq_jax'


def test_the_training_cell_runs_again_with_other_steps(monkeypatch):
  [cell] = (x for x in load(STORED) if 'train(config' in ''.join(x['source']))
  seen = []
  for steps in ('200', '800', '1200'):
    monkeypatch.setenv('RVQ_JAX_STEPS', steps)
    values = {'os': os, 'Path': Path, 'photos': photos}
    values |= {'RUN': 'pretrained:tiny_f4', 'workdir': None}
    values['train'] = lambda config, _: seen.append(config_lib.flatten(config))
    exec(''.join(cell['source']), values)
  for config in seen[1:]:
    config_lib.check_resume(config, seen[0])


def own_image(name, **modules):
  """What the cell for one's own image reads."""
  [cell] = (x for x in load(STORED) if 'IMAGE =' in ''.join(x['source']))
  values = {'os': os, 'sys': types.SimpleNamespace(modules=modules)}
  values |= {'Path': Path, 'Image': Image, 'np': np, 'skimage': skimage}
  values['decode_image'] = decode_image
  with mock.patch.dict(os.environ, RVQ_JAX_IMAGE=str(name)):
    exec(''.join(cell['source']), values)
  return values['photograph']


def test_the_notebook_takes_an_image_of_ones_own(tmp_path):
  Image.new('RGB', (1280, 640), 'red').save(tmp_path / 'mine.png')
  image = own_image(tmp_path / 'mine.png')
  assert image.shape == (320, 640, 3) and (image == [255, 0, 0]).all()
  np.testing.assert_array_equal(own_image(''), skimage.data.chelsea())


@pytest.mark.parametrize(
  ('uploaded', 'shape'), [(True, (9, 7, 3)), (False, (300, 451, 3))]
)
def test_colab_asks_for_an_image(uploaded, shape, tmp_path, monkeypatch):
  path = tmp_path / 'mine.png'
  Image.new('RGB', (7, 9)).save(path)
  chosen = {str(path): b''} if uploaded else {}
  files = mock.Mock(**{'files.upload.return_value': chosen})
  monkeypatch.setitem(sys.modules, 'google.colab', files)
  assert own_image('', **{'google.colab': files}).shape == shape


def test_an_unreadable_image_ends_in_one_line(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = Path('mine.png')
  message = f'^Cannot read (?=.*{path.resolve()})'
  with one_line(f'{message}.*No such file', SystemExit):
    own_image(path)
  path.write_text('text')
  with one_line(f'{message}.*in no format', SystemExit):
    own_image(path)
