"""What the README shows is what runs."""

import re
from pathlib import Path

import numpy as np

TEXT = (Path(__file__).resolve().parents[1] / 'README.md').read_text()


def test_the_layer_example_runs_and_moves_its_codebook():
  blocks = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  (example,) = (block for block in blocks if 'class Model' in block)
  scope = {}
  exec(example, scope)
  assert scope['y'].shape == scope['x'].shape
  assert scope['ids'].shape == (128,)
  book = scope['updates']['codebook']['VectorQuantizer_0']
  before = scope['variables']['codebook']['VectorQuantizer_0']
  assert np.any(np.asarray(book['embedding'] != before['embedding']))


def test_links_lead_to_files():
  root = Path(__file__).resolve().parents[1]
  for target in re.findall(r'\]\(([^)#]+)\)', TEXT):
    assert target.startswith('http') or (root / target).exists(), target
