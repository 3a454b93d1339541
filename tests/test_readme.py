"""The README's code runs as it is shown."""

import re

import numpy as np
from doc_blocks import ROOT, blocks

TEXT = (ROOT / 'README.md').read_text()


def test_the_layer_example_runs_and_moves_its_codebook():
  (example,) = (code for _, code in blocks(TEXT, 'python') if 'class' in code)
  scope = {}
  exec(example, scope)
  assert scope['y'].shape == scope['x'].shape
  assert scope['ids'].shape == (128,)
  book = scope['updates']['codebook']['VectorQuantizer_0']
  before = scope['variables']['codebook']['VectorQuantizer_0']
  assert np.any(np.asarray(book['embedding'] != before['embedding']))


def test_links_lead_to_files():
  for target in re.findall(r'\]\(([^)#]+)\)', TEXT):
    assert target.startswith('http') or (ROOT / target).exists(), target
