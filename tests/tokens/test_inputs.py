"""What the name of an input means."""

import logging

import pytest
from PIL import Image

from rvq_jax.tokens import encode


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The current directory, with a folder of two images called photos."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'photos').mkdir()
  for i in range(2):
    Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path / f'photos/{i}.png')
  return tmp_path


@pytest.mark.parametrize('name', ['photos', './photos', 'folder:photos'])
def test_a_folder_goes_before_the_data_set_of_its_name(here, name, caplog):
  with caplog.at_level(logging.INFO):
    splits = encode.open_input(name)
  assert [r.name for r in splits['all']] == ['0.png', '1.png']
  assert ('tfds:photos' in caplog.text) == (name == 'photos')


@pytest.mark.parametrize('name', ['photos', 'tfds:photos'])
def test_the_embedded_photographs_can_be_named(here, name, tmp_path):
  if name == 'photos':
    (here / 'photos').rename(here / 'mine')
  splits = encode.open_input(name, str(tmp_path / 'data'))
  assert len(splits['test']) == 400
