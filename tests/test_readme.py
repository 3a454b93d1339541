"""The README's code and commands run as they are shown."""

import re

import numpy as np
import pytest
from doc_blocks import ROOT, SHORT, blocks, commands, run_command
from PIL import Image

from rvq_jax.data.photos import photograph

TEXT = (ROOT / 'README.md').read_text()


def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  scope = {}
  for _, code in blocks(TEXT, 'python'):
    exec(code, scope)
  with Image.open('decoded.png') as image:
    decoded = np.asarray(image.convert('RGB'), np.float32)
  assert decoded.shape == (512, 512, 3)
  assert np.mean((decoded - photograph('astronaut')) ** 2) < 500
  assert scope['y'].shape == scope['x'].shape
  assert scope['ids'].shape == (128,)
  book = scope['moved']['codebook']['VectorQuantizer_0']
  before = scope['variables']['codebook']['VectorQuantizer_0']
  assert np.any(np.asarray(book['embedding'] != before['embedding']))
  assert scope['out'].ids.shape == (128,)


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
  for part in ('train', 'validation', 'test'):
    (tmp_path / 'images' / part).mkdir(parents=True)
    for i, image in enumerate(images):
      Image.fromarray(image).save(tmp_path / f'images/{part}/{i}.png')
  write = f'{ROOT}/examples/shards.py --data=folder:images --output=written'
  run_command(f'python {write} --shards=2 --batches=1', tmp_path)
  (tmp_path / 'written/wds').rename(tmp_path / 'tars')
  (tmp_path / 'written/parquet').rename(tmp_path / 'tables')
  Image.fromarray(photograph('chelsea')).save(tmp_path / 'photo.jpg')
  for _, code in blocks(TEXT, 'bash'):
    for command in commands(code):
      if command.startswith('rvq'):
        more = (*SHORT, '--config.data.image_size=32')
        train = command.startswith('rvq train')
        run_command(command, tmp_path, *(more if train else ()))
  with Image.open(tmp_path / 'decoded.png') as image:
    assert image.size == (451, 300)
  assert 'pretrained' in (tmp_path / 'explore.html').read_text()
  assert len(list(tmp_path.glob('runs/*/evaluation/test/metrics.json'))) == 3


def test_the_table_of_peers_skims():
  cells = re.findall(r'(?<=\|)[^|\n]+(?=\|)', TEXT)
  assert cells and max(map(len, cells)) <= 62  # 60 and two spaces
  assert len(TEXT.splitlines()) <= 160


def test_links_lead_to_files():
  for target in re.findall(r'\]\(([^)#]+)', TEXT):
    assert target.startswith('http') or (ROOT / target).exists(), target
