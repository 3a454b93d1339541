"""CIFAR-10 from a tiny archive of the official shape."""

import hashlib
import io
import os
import tarfile

import numpy as np
import pytest

from rvq_jax.data import cifar10
from rvq_jax.data.builders import prepare_recipe
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.transforms import decode_image

FILE = 'cifar-10-binary.tar.gz'


def _records(seed, count):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 10, (count, 1), dtype=np.uint8)
  pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
  return np.hstack([labels, pixels])


def _contents():
  files = {f'data_batch_{i}.bin': _records(i, 4) for i in range(1, 6)}
  return files | {'test_batch.bin': _records(6, 3)}


def _archive(folder, files):
  """Writes the archive; returns its sha256."""
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, FILE)
  with tarfile.open(path, 'w:gz') as archive:
    for name in reversed(list(files)):  # official tars are not in order either
      data = bytes(np.ascontiguousarray(files[name]).data)
      member = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  with open(path, 'rb') as stream:
    return hashlib.sha256(stream.read()).hexdigest()


def _by_name(source):
  return {record.name: record for record in source}


def test_every_image_and_label_is_the_one_in_the_archive(tmp_path):
  files = _contents()
  sha256 = _archive(tmp_path / 'downloads' / 'manual', files)
  prepare_recipe(cifar10.make_recipe(sha256=sha256), str(tmp_path))
  dataset = open_dataset('tfds:cifar10', data_dir=str(tmp_path))
  train = np.concatenate([files[f'data_batch_{i}.bin'] for i in range(1, 6)])
  for split, source, records in (
    ('train', dataset.train, train),
    ('test', dataset.test, files['test_batch.bin']),
  ):
    found = _by_name(source)
    assert len(found) == len(records)
    for i, record in enumerate(records):
      stored = found[f'{split}_{i:05d}']
      assert stored.label == record[0]
      image = decode_image(stored.image)
      for channel in range(3):
        plane = record[1 + 1024 * channel :][:1024].reshape(32, 32)
        np.testing.assert_array_equal(image[..., channel], plane)


def test_layout_and_features_are_those_of_tfds(tmp_path):
  import tensorflow_datasets as tfds

  sha256 = _archive(tmp_path / 'downloads' / 'manual', _contents())
  recipe = cifar10.make_recipe(sha256=sha256)
  directory = prepare_recipe(recipe, str(tmp_path))
  assert directory == str(tmp_path / 'cifar10' / '3.0.2')
  info = tfds.builder_from_directory(directory).info
  assert set(info.features) == {'id', 'image', 'label'}
  assert info.features['image'].shape == (32, 32, 3)
  assert info.features['label'].names[6] == 'frog'


def test_archive_is_downloaded_where_there_is_a_network(tmp_path):
  sha256 = _archive(tmp_path / 'server', _contents())
  url = (tmp_path / 'server' / FILE).as_uri()
  recipe = cifar10.make_recipe(url=url, sha256=sha256)
  prepare_recipe(recipe, str(tmp_path / 'data'))
  manual = tmp_path / 'data' / 'downloads' / 'manual'
  assert os.listdir(manual) == [FILE]


def test_failed_download_says_where_to_put_the_archive(tmp_path):
  recipe = cifar10.make_recipe(url=(tmp_path / 'no' / FILE).as_uri())
  with pytest.raises(ValueError, match='put it at') as error:
    prepare_recipe(recipe, str(tmp_path))
  manual = tmp_path / 'downloads' / 'manual'
  assert str(manual / FILE) in str(error.value)
  assert '\n' not in str(error.value)
  assert os.listdir(manual) == []


def test_wrong_checksum_is_one_line_and_prepares_nothing(tmp_path):
  _archive(tmp_path / 'downloads' / 'manual', _contents())
  with pytest.raises(ValueError, match=cifar10.SHA256) as error:
    prepare_recipe(cifar10.RECIPE, str(tmp_path))
  assert '\n' not in str(error.value)
  assert not os.path.exists(tmp_path / 'cifar10' / '3.0.2')


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda files: files.pop('data_batch_3.bin'), 'no file .*data_batch_3'),
    (
      lambda files: files.update({'test_batch.bin': _records(6, 3)[:, 1:]}),
      'multiple of 3073',
    ),
  ],
)
def test_archive_of_another_shape_is_refused(tmp_path, change, message):
  files = _contents()
  change(files)
  sha256 = _archive(tmp_path / 'downloads' / 'manual', files)
  with pytest.raises(ValueError, match=message):
    prepare_recipe(cifar10.make_recipe(sha256=sha256), str(tmp_path))


def test_a_member_that_points_out_of_the_archive_is_never_written(tmp_path):
  manual = tmp_path / 'data' / 'downloads' / 'manual'
  _archive(manual, _contents() | {'../../../../evil': _records(0, 1)})
  sha256 = hashlib.sha256((manual / FILE).read_bytes()).hexdigest()
  recipe = cifar10.make_recipe(sha256=sha256)
  prepare_recipe(recipe, str(tmp_path / 'data'))
  assert not [path for path in tmp_path.rglob('*evil*')]
  assert not (tmp_path.parent / 'evil').exists()
