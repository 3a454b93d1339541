"""The notebook is what its source makes, with pictures, and it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / 'notebooks'
STORED = NOTEBOOKS / 'rvq_jax.ipynb'


def load(path):
  return json.loads(path.read_text())['cells']


def pictures(cells):
  return [
    output['data']['image/png']
    for cell in cells
    for output in cell.get('outputs', ())
    if 'image/png' in output.get('data', {})
  ]


def test_the_stored_notebook_is_that_of_its_source():
  source = jupytext.read(NOTEBOOKS / 'tour.py').cells
  stored = [(x['cell_type'], ''.join(x['source'])) for x in load(STORED)]
  assert stored == [(x.cell_type, x.source) for x in source]


def test_the_stored_notebook_shows_its_pictures_and_no_error():
  cells = load(STORED)
  outputs = [x for cell in cells for x in cell.get('outputs', ())]
  assert len(pictures(cells)) == 8
  assert all(x['output_type'] != 'error' for x in outputs)
  text = json.dumps(outputs)
  assert 'step 300/300' in text and 'JPEG' in text
  assert str(NOTEBOOKS.parent) not in text and str(Path.home()) not in text
  assert STORED.stat().st_size < 1.5e6


@pytest.mark.slow
def test_the_notebook_runs_in_short(tmp_path):
  output = tmp_path / 'short.ipynb'
  subprocess.run(
    [sys.executable, NOTEBOOKS / 'execute.py', output],
    env=os.environ
    | {
      'RVQ_JAX_STEPS': '24',
      'RVQ_JAX_WORKDIR': str(tmp_path / 'run'),
      'TFDS_DATA_DIR': str(tmp_path / 'data'),
      'XLA_FLAGS': '',
      'JAX_PLATFORMS': 'cpu',
    },
    check=True,
    timeout=900,
  )
  cells = load(output)
  assert len(pictures(cells)) == 8
  assert 'step 24/24' in json.dumps(cells)
