"""What the name of an input means, and sets of tfds as tokens."""

import io
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data.prepare import write_tfds
from rvq_jax.data.transforms import decode_image, resize_and_center_crop
from rvq_jax.tokens import encode, inputs
from rvq_jax.tokens.shards import TokenSource


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
    splits = inputs.open_input(name)
  assert [r.name for r in splits['all']] == ['0.png', '1.png']
  assert ('tfds:photos' in caplog.text) == (name == 'photos')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Where the embedded photographs are prepared, once for the module."""
  return str(tmp_path_factory.mktemp('data'))


@pytest.mark.parametrize('name', ['photos', 'tfds:photos'])
def test_the_embedded_photographs_can_be_named(here, name, prepared):
  if name == 'photos':
    (here / 'photos').rename(here / 'mine')
  splits = inputs.open_input(name, prepared)
  assert len(splits['test']) == 400


def run(tokenizer, source, folder):
  about = {'input': 'a set', 'split': 'test'}
  return encode.encode_dataset(
    tokenizer, source, folder, about=about, image_size=16, shard_size=100
  )


def check_tokens(tokenizer, source, folder):
  """Every record bears name and label of its image, and the ids of it."""
  stored = TokenSource(folder)
  assert len(stored) == len(source)
  batch = encode.batch_size(16)
  for start in range(0, len(source), 100):  # a shard
    records = [source[i] for i in range(start, min(start + 100, len(source)))]
    images = np.stack(
      [resize_and_center_crop(decode_image(r.image), 16) for r in records]
    )
    filled = np.concatenate(
      [images, images[-1:].repeat(batch - len(images), 0)]
    )
    ids = np.asarray(tokenizer.encode(filled))
    for i, record in enumerate(records):
      got = stored[start + i]
      assert (got.name, got.label) == (record.name, record.label)
      np.testing.assert_array_equal(got.ids, ids[i])


def test_the_embedded_photographs_become_tokens(
  make_tokenizer, prepared, tmp_path
):
  (source,) = inputs.open_input('photos', prepared, split='test').values()
  tokenizer = make_tokenizer()
  assert run(tokenizer, source, tmp_path / 'tokens')['images'] == 400
  check_tokens(tokenizer, source, tmp_path / 'tokens')


@pytest.fixture
def prepare(photograph, tmp_path):
  """Returns a function that prepares a version of a set of 130 images."""

  def examples():
    def read(i):
      buffer = io.BytesIO()
      Image.fromarray(photograph(20, 24, i)).save(buffer, 'PNG')
      return {'image': buffer.getvalue(), 'label': i % 3, 'id': f'number {i}'}

    return range(130), read

  def make(version):
    features = {
      'image': tfds.features.Image(shape=(20, 24, 3)),
      'label': tfds.features.ClassLabel(num_classes=3),
      'id': tfds.features.Text(),
    }
    write_tfds(
      'toy',
      version,
      str(tmp_path / 'sets'),
      lambda: (features, {'test': examples()}),
      num_shards=2,
    )
    return inputs.open_input('tfds:toy', str(tmp_path / 'sets'))['test']

  return make


def test_a_tfds_set_becomes_tokens(prepare, make_tokenizer, tmp_path):
  source, tokenizer = prepare('1.0.0'), make_tokenizer()
  run(tokenizer, source, tmp_path / 'tokens')
  check_tokens(tokenizer, source, tmp_path / 'tokens')
  assert {f'number {i}' for i in range(130)} == {
    TokenSource(tmp_path / 'tokens')[i].name for i in range(130)
  }


def test_another_version_of_a_tfds_set_is_refused(
  prepare, make_tokenizer, tmp_path
):
  tokenizer = make_tokenizer()
  run(tokenizer, prepare('1.0.0'), tmp_path / 'tokens')
  run(tokenizer, prepare('1.0.0'), tmp_path / 'tokens')
  with pytest.raises(ValueError, match='begun with other images than a set'):
    run(tokenizer, prepare('1.1.0'), tmp_path / 'tokens')
