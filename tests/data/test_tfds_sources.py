"""Prepared tfds directories: read without TensorFlow, faults in one line."""

import functools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from errors import one_line
from PIL import Image
from tiny_data import as_tfrecord, encoded

from rvq_jax.data import tfds_sources
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.loaders import eval_batches, make_train_loader
from rvq_jax.data.prepare import write_tfds

LABEL = {'label': tfds.features.ClassLabel(num_classes=3)}
ID = {'id': tfds.features.Text()}
NAMES = ('train', 'test', 'validation')


def _image(i):
  return encoded(Image.new('RGB', (4, 4), (i, 0, 0)))


def _prepare(
  folder, counts=(9, 3), *, name='toy', fields=LABEL | ID, names=NAMES, **values
):
  """Writes splits, the first in two files; image i has label i % 3."""

  def read(split, i):
    known = split != 'test' or name != 'imagenet2012'
    example = {'label': i % 3 if known else -1, 'id': f'{split}_{i}'} | values
    return {'image': _image(i)} | {field: example[field] for field in fields}

  splits = {
    split: (range(count), functools.partial(read, split))
    for split, count in zip(names, counts, strict=False)
  }
  features = {'image': tfds.features.Image(shape=(4, 4, 3))} | fields
  half = -(-counts[0] // 2)
  return write_tfds(
    name, '1.0.0', str(folder), lambda: (features, splits), shard_size=half
  )


def _open(folder, name='toy', **options):
  return open_dataset(f'tfds:{name}', data_dir=str(folder), **options)


def _names(source):
  return {record.name for record in source}


def test_records_come_back_as_they_were_written_and_pickled(tmp_path):
  _prepare(tmp_path)
  train = _open(tmp_path).train
  assert _names(train) == {f'train_{i}' for i in range(9)}
  for index, record in enumerate(train):
    number = int(record.name.removeprefix('train_'))
    assert record.image == _image(number)
    assert record.label == train.labels[index] == number % 3
  copy = pickle.loads(pickle.dumps(train))  # noqa: S301, made here
  assert list(copy) == list(train)


def test_reading_needs_no_tensorflow(tmp_path):
  _prepare(tmp_path)
  script = (
    'import sys; from rvq_jax.data.datasets import open_dataset; '
    'open_dataset("tfds:toy", data_dir=sys.argv[1]).train[0]; '
    'sys.exit("tensorflow" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', script, str(tmp_path)], check=True)


def test_the_test_split_of_imagenet_has_no_labels_and_is_left_out(tmp_path):
  _prepare(tmp_path, (20, 7, 10), name='imagenet2012')
  dataset = _open(tmp_path, 'imagenet2012')
  assert len(dataset.test) == len(dataset.validation) == 10
  assert 'validation split' in dataset.note
  dataset = _open(tmp_path, 'imagenet2012', split='paper')
  parts = (dataset.train, dataset.validation, dataset.test)
  assert [len(part) for part in parts] == [21, 6, 3]
  names = set().union(*map(_names, parts))
  assert len(names) == 30
  assert not any(name.startswith('test') for name in names)


NUMBERED = {'id': tfds.features.Scalar(np.int64), 'label': tfds.features.Text()}


@pytest.mark.parametrize('fields, name', [({}, 'train/2'), (NUMBERED, '7')])
def test_a_number_is_a_name_a_text_no_class_and_val_is_validation(
  tmp_path, fields, name
):
  _prepare(tmp_path, fields=fields, names=('train', 'val'), id=7, label='cat')
  train = _open(tmp_path).train
  assert len(_open(tmp_path).validation) == 3
  assert (train[2].name, train[2].label) == (name, -1)
  assert train.labels.tolist() == [-1] * 9


@pytest.mark.parametrize('split', ['official', 'paper'])
@pytest.mark.parametrize('label', [-(2**31), -2, 2**31 - 1, 2**31, -(2**40)])
def test_a_label_is_any_number_of_32_bits(tmp_path, split, label):
  _prepare(tmp_path, (20, 10), fields={'label': np.int64} | ID, label=label)
  if abs(label + 0.5) > 2**31:
    with one_line(f'labels .* from {label} to {label}: expected .* 2147483647'):
      list(_open(tmp_path, split=split).train.labels)
    return
  data = _open(tmp_path, split=split)
  assert set(data.train.labels) == {label}
  assert len(data.train) == (20 if split == 'official' else 21)


@pytest.mark.parametrize('cache', ['valid', 'outdated', 'hostile'])
def test_only_a_valid_cache_of_labels_is_read(tmp_path, monkeypatch, cache):
  monkeypatch.setattr(tfds_sources, '_CACHE_LABELS_FROM', 1)
  directory = _prepare(tmp_path)
  right = _open(tmp_path).train.labels
  path = os.path.join(directory, '.train-labels.npy')
  if cache == 'hostile':  # it claims a trillion labels
    header = {'descr': '<i4', 'fortran_order': False, 'shape': (10**12,)}
    with open(path, 'wb') as stream:
      np.lib.format.write_array_header_1_0(stream, header)
  else:
    np.save(path, np.load(path) + 1)
  if cache == 'outdated':
    os.utime(path, (0, 0))
  again = _open(tmp_path).train.labels
  np.testing.assert_array_equal(again, right + (cache == 'valid'))


DAMAGES = {
  'none': lambda folder: None,
  'a file': lambda folder: sorted(folder.glob('*-train.*'))[1].unlink(),
  'format': as_tfrecord,
  'cut': lambda folder: (folder / 'dataset_info.json').write_text('{"name": '),
}


@pytest.mark.parametrize(
  ('damage', 'name', 'splits', 'message'),
  [
    ('none', 'a b:c', NAMES, 'NAME:VERSION'),
    ('none', 'toy', ('a', 'b'), 'validation, test, got a, b'),
    ('a file', 'toy', NAMES, 'toy-train.array_record-00001.* is missing'),
    ('format', 'toy', NAMES, '--file_format=array_record'),
    ('cut', 'toy', NAMES, 'cannot open tfds:toy'),
  ],
)
def test_a_fault_is_one_line(tmp_path, damage, name, splits, message):
  DAMAGES[damage](Path(_prepare(tmp_path, names=splits)))
  with one_line(message):
    _open(tmp_path, name)


def test_the_folder_is_that_of_tfds_and_home_is_expanded(tmp_path, monkeypatch):
  _prepare(tmp_path / 'd')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(_open('~/d').train) == 9
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'd'))
  assert len(open_dataset('tfds:toy').train) == 9


@pytest.fixture
def damaged(tmp_path):
  """200 training images; a byte of one of them is another one."""
  [path, *_] = sorted(Path(_prepare(tmp_path, (200, 3))).glob('*train.array*'))
  data = bytearray(path.read_bytes())
  data[10_000] ^= 1
  path.write_bytes(data)
  return _open(tmp_path).train


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_damaged_record_is_left_out_and_named(damaged, in_memory, caplog):
  sizes = {'batch_size': 20, 'image_size': 4}
  loader = make_train_loader(damaged, in_memory=in_memory, **sizes)
  batches = [next(loader)['image'] for _ in range(10)]
  loader.close()
  [message] = caplog.messages
  expected = r'skipped image record (\d+): train/\1 of .*Corrupted'
  assert re.search(expected, message)
  # An epoch of 199 has nine full batches.
  assert len({image.tobytes() for b in batches for image in b}) >= 180
  masks = [batch['mask'] for batch in eval_batches(damaged, **sizes)]
  assert np.sum(masks) == 199
  with one_line('cannot be read.*prepare it'):
    _ = damaged.labels
