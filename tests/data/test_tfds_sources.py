"""tfds:NAME: splits, labels and names of prepared directories."""

import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rvq_jax.data import tfds_sources
from rvq_jax.data.builders import Examples, Recipe, prepare_recipe
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.loaders import eval_batches, make_train_loader


def _image(i):
  buffer = io.BytesIO()
  Image.new('RGB', (4, 4), (i, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


def _prepare(data_dir, counts, *, name='toy', label=True, file_name='id'):
  """Writes a data set whose image i has label i % 3."""

  def features():
    fields = {'image': tfds.features.Image(shape=(4, 4, 3))}
    if label:
      fields['label'] = tfds.features.ClassLabel(num_classes=3)
    if file_name:
      fields[file_name] = tfds.features.Text()
    return tfds.features.FeaturesDict(fields)

  def examples(split, count):
    def read(i):
      known = split != 'test' or name != 'imagenet2012'
      example = {'image': _image(i)}
      if label:
        example['label'] = i % 3 if known else -1
      if file_name:
        example[file_name] = f'{split}_{i}'
      return example

    return Examples(range(count), read)

  recipe = Recipe(
    name=name,
    version='1.0.0',
    description='toy',
    homepage='',
    num_shards=2,
    features=features,
    splits=lambda _: {s: examples(s, n) for s, n in counts.items()},
  )
  return prepare_recipe(recipe, str(data_dir))


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
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert dataset.train[0].image
  assert 'tensorflow' not in sys.modules


def test_test_split_serves_as_validation_and_is_noted(tmp_path):
  _prepare(tmp_path, {'train': 3, 'test': 4})
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert _names(dataset.validation) == _names(dataset.test)
  assert dataset.note == 'tfds:toy: validation and test are both its test split'


def test_three_splits_are_used_as_they_are(tmp_path):
  _prepare(tmp_path, {'train': 3, 'validation': 4, 'test': 5})
  dataset = open_dataset('tfds:toy', data_dir=str(tmp_path))
  assert len(dataset.validation) == 4
  assert len(dataset.test) == 5
  assert dataset.note == ''


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
  assert repr(copy) == repr(source)
  assert copy[4] == source[4]


def test_labels_of_a_large_split_are_kept_beside_it(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_sources, '_KEEP_LABELS_FROM', 1)
  directory = _prepare(tmp_path, {'train': 9, 'test': 3})
  first = tfds_sources.TfdsSource(directory, 'train').labels
  again = tfds_sources.TfdsSource(directory, 'train')
  monkeypatch.setattr(again, '_read_labels', None)
  np.testing.assert_array_equal(again.labels, first)


def test_kept_labels_older_than_the_data_are_read_again(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_sources, '_KEEP_LABELS_FROM', 1)
  directory = _prepare(tmp_path, {'train': 9, 'test': 3})
  right = tfds_sources.TfdsSource(directory, 'train').labels
  kept = os.path.join(directory, '.train-labels.npy')
  np.save(kept, np.zeros(9, np.int32))
  os.utime(kept, (0, 0))
  again = tfds_sources.TfdsSource(directory, 'train').labels
  np.testing.assert_array_equal(again, right)


def test_kept_labels_that_claim_a_trillion_are_not_believed(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(tfds_sources, '_KEEP_LABELS_FROM', 1)
  directory = _prepare(tmp_path, {'train': 9, 'test': 3})
  right = tfds_sources.TfdsSource(directory, 'train').labels
  header = {'descr': '<i4', 'fortran_order': False, 'shape': (10**12,)}
  with open(os.path.join(directory, '.train-labels.npy'), 'wb') as stream:
    np.lib.format.write_array_header_1_0(stream, header)
  again = tfds_sources.TfdsSource(directory, 'train').labels
  np.testing.assert_array_equal(again, right)


def test_unprepared_data_set_says_how_to_prepare_it(tmp_path):
  with pytest.raises(ValueError, match='tfds build nosuch') as error:
    open_dataset('tfds:nosuch', data_dir=str(tmp_path))
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


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


def test_home_is_expanded_in_data_dir(tmp_path, monkeypatch):
  _prepare(tmp_path / 'd', {'train': 3, 'test': 3})
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(open_dataset('tfds:toy', data_dir='~/d').train) == 3


def test_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
  _prepare(tmp_path, {'train': 3, 'test': 3})
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
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
def test_a_damaged_record_is_skipped_named_and_counted(damaged, in_memory):
  skipped = {}
  loader = make_train_loader(
    damaged,
    batch_size=20,
    image_size=4,
    in_memory=in_memory,
    on_skip=skipped.__setitem__,
  )
  seen = set()
  for _ in range(10):
    seen |= set(next(loader)['image'][:, 0, 0, 0].tolist())
  loader.close()
  assert loader.skipped == 1
  [(name, reason)] = skipped.items()
  number = name.removeprefix('record ')
  assert f'train/{number} of ' in reason and 'Corrupted' in reason
  assert len(seen) >= 180  # an epoch of 199 has nine full batches


def test_a_damaged_record_is_masked_in_evaluation(damaged):
  batches = eval_batches(damaged, batch_size=20, image_size=4)
  assert sum(batch['mask'].sum() for batch in batches) == 199


def test_labels_of_a_damaged_record_are_one_line(damaged):
  with pytest.raises(ValueError, match='cannot be read') as caught:
    _ = damaged.labels
  assert '\n' not in str(caught.value) and 'prepare it' in str(caught.value)
