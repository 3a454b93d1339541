"""tfds:NAME: splits, labels and names of prepared directories."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data import tfds_sources
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.loaders import eval_batches, make_train_loader
from rvq_jax.data.prepare import write_tfds


def _image(i):
  buffer = io.BytesIO()
  Image.new('RGB', (4, 4), (i, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


def _prepare(data_dir, counts, *, name='toy', label=True, file_name='id'):
  """Writes a data set whose image i has label i % 3."""
  features = {'image': tfds.features.Image(shape=(4, 4, 3))}
  if label:
    features['label'] = tfds.features.ClassLabel(num_classes=3)
  if file_name:
    features[file_name] = tfds.features.Text()

  def examples(split, count):
    known = split != 'test' or name != 'imagenet2012'

    def read(i):
      example = {'label': i % 3 if known else -1, file_name: f'{split}_{i}'}
      return {'image': _image(i)} | {f: example[f] for f in list(features)[1:]}

    return range(count), read

  splits = {s: examples(s, n) for s, n in counts.items()}
  half = -(-counts['train'] // 2)
  return write_tfds(
    name, '1.0.0', str(data_dir), lambda: (features, splits), shard_size=half
  )


def _names(source):
  return {record.name for record in source}


def test_records_come_back_as_they_were_written(tmp_path):
  _prepare(tmp_path, {'train': 9, 'test': 3})
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert len(dataset.train) == 9
  for index in range(9):
    record = dataset.train[index]
    number = int(record.name.removeprefix('train_'))
    assert record.image == _image(number)
    assert record.label == number % 3
    assert dataset.train.labels[index] == number % 3


def test_reading_needs_no_tensorflow(tmp_path):
  _prepare(tmp_path, {'train': 3, 'test': 3})
  script = (
    'import sys; from rvq_jax.data.datasets import open_dataset; '
    'open_dataset("tfds:toy", data_dir=sys.argv[1]).train[0]; '
    'sys.exit("tensorflow" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', script, str(tmp_path)], check=True)


def test_imagenet_is_tested_on_its_validation_split(tmp_path):
  counts = {'train': 3, 'validation': 4, 'test': 5}
  _prepare(tmp_path, counts, name='imagenet2012')
  dataset = open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  assert len(dataset.test) == len(dataset.validation) == 4
  assert 'validation split' in dataset.note


def test_paper_split_of_imagenet_leaves_out_the_unlabelled_images(tmp_path):
  counts = {'train': 20, 'validation': 10, 'test': 7}
  _prepare(tmp_path, counts, name='imagenet2012')
  dataset = open_dataset(
    'tfds:imagenet2012', split='paper', data_dir=str(tmp_path)
  )
  parts = (dataset.train, dataset.validation, dataset.test)
  assert [len(part) for part in parts] == [21, 6, 3]
  names = set().union(*map(_names, parts))
  assert len(names) == 30
  assert not any(name.startswith('test') for name in names)


def test_paper_split_depends_on_its_seed_only(tmp_path):
  _prepare(tmp_path, {'train': 20, 'test': 10})

  def names(seed):
    return _names(
      open_dataset(
        'tfds:toy', split='paper', data_dir=str(tmp_path), seed=seed
      ).test
    )

  assert names(1) == names(1)
  assert names(1) != names(2)


def test_without_a_name_feature_the_index_names_the_image(tmp_path):
  _prepare(tmp_path, {'train': 3, 'test': 3}, file_name=None)
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert dataset.train[2].name == 'train/2'


def test_without_labels_every_label_is_minus_one(tmp_path):
  _prepare(tmp_path, {'train': 3, 'test': 3}, label=False)
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert dataset.train.labels.tolist() == [-1] * 3
  assert dataset.train[0].label == -1


def test_source_survives_pickling(tmp_path):
  _prepare(tmp_path, {'train': 5, 'test': 3})
  source = open_dataset('tfds:toy', data_dir=str(tmp_path)).train
  copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
  assert list(copy) == list(source)


@pytest.mark.parametrize('cache', ['valid', 'outdated', 'hostile'])
def test_only_a_valid_cache_of_labels_is_read(tmp_path, monkeypatch, cache):
  monkeypatch.setattr(tfds_sources, '_CACHE_LABELS_FROM', 1)
  directory = _prepare(tmp_path, {'train': 9, 'test': 3})
  right = tfds_sources.TfdsSource(directory, 'train').labels.copy()
  path = os.path.join(directory, '.train-labels.npy')
  written = right
  if cache == 'hostile':  # it claims a trillion labels
    header = {'descr': '<i4', 'fortran_order': False, 'shape': (10**12,)}
    with open(path, 'wb') as stream:
      np.lib.format.write_array_header_1_0(stream, header)
  else:
    written = np.load(path) + 1
    np.save(path, written)
  if cache == 'outdated':
    os.utime(path, (0, 0))
  expected = written if cache == 'valid' else right
  again = tfds_sources.TfdsSource(directory, 'train').labels
  np.testing.assert_array_equal(again, expected)


def test_malformed_name_is_refused(tmp_path):
  with pytest.raises(ValueError, match='NAME:VERSION'):
    open_dataset('tfds:a b:c', data_dir=str(tmp_path))


def test_missing_record_file_is_named(tmp_path):
  directory = _prepare(tmp_path, {'train': 9, 'test': 3})
  lost = sorted(f for f in os.listdir(directory) if '-train.' in f)[1]
  os.remove(os.path.join(directory, lost))
  with pytest.raises(ValueError, match=lost):
    open_dataset('tfds:toy', data_dir=str(tmp_path))


def test_other_file_format_is_refused_with_the_remedy(tmp_path):
  directory = _prepare(tmp_path, {'train': 3, 'test': 3})
  path = os.path.join(directory, 'dataset_info.json')
  with open(path) as stream:
    info = json.load(stream)
  info['fileFormat'] = 'tfrecord'
  with open(path, 'w') as stream:
    json.dump(info, stream)
  with pytest.raises(ValueError, match='array_record'):
    tfds_sources.TfdsSource(directory, 'train')


def test_the_folder_is_that_of_tfds_and_home_is_expanded(tmp_path, monkeypatch):
  _prepare(tmp_path / 'd', {'train': 3, 'test': 3})
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(open_dataset('tfds:toy', data_dir='~/d').train) == 3
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'd'))
  assert len(open_dataset('tfds:toy').train) == 3


def test_damaged_description_is_one_clear_line(tmp_path):
  directory = _prepare(tmp_path, {'train': 3, 'test': 3})
  with open(os.path.join(directory, 'dataset_info.json'), 'w') as stream:
    stream.write('{"name": ')
  with pytest.raises(ValueError, match='cannot open tfds:toy') as error:
    open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.fixture
def damaged(tmp_path):
  """200 training images; a byte of one of them is another one."""
  directory = _prepare(tmp_path, {'train': 200, 'test': 3})
  [path, *_] = sorted(Path(directory).glob('*train.array_record*'))
  data = bytearray(path.read_bytes())
  data[10_000] ^= 1
  path.write_bytes(data)
  return open_dataset('tfds:toy', data_dir=str(tmp_path)).train


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_damaged_record_is_left_out_and_named(damaged, in_memory, caplog):
  loader = make_train_loader(
    damaged, batch_size=20, image_size=4, in_memory=in_memory
  )
  seen = set()
  for _ in range(10):
    seen |= set(next(loader)['image'][:, 0, 0, 0].tolist())
  loader.close()
  [record] = caplog.records
  assert re.search(
    r'left out image record (\d+): train/\1 of .*Corrupted', record.message
  )
  assert len(seen) >= 180  # an epoch of 199 has nine full batches


def test_a_damaged_record_is_masked_in_evaluation(damaged):
  batches = eval_batches(damaged, batch_size=20, image_size=4)
  assert sum(batch['mask'].sum() for batch in batches) == 199


def test_labels_of_a_damaged_record_are_one_line(damaged):
  with pytest.raises(ValueError, match='cannot be read') as caught:
    _ = damaged.labels
  assert '\n' not in str(caught.value) and 'prepare it' in str(caught.value)
