"""CIFAR-10 and ImageNet from tiny archives of the official shape."""

import hashlib
import io
import multiprocessing
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from errors import one_line
from PIL import Image
from tiny_data import as_tfrecord, encoded

from rvq_jax.data import prepare
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.transforms import decode_image

CIFAR = os.path.basename(prepare.CIFAR_URL)
PIXELS = np.random.default_rng(0).integers(0, 10, (23, 3073), np.uint8)
FILES = [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']
RECORDS = dict(zip(FILES, np.split(PIXELS, range(4, 21, 4)), strict=True))
# The first, second and last class in the official order.
CLASSES = {'n01440764': 0, 'n01443537': 1, 'n15075141': 999}
# Labels of the first three validation images, from the development kit.
VALIDATION = {1: 65, 2: 970, 3: 230}
LINK = tarfile.TarInfo('ILSVRC2012_val_00000001.JPEG')
LINK.type, LINK.linkname = tarfile.SYMTYPE, '/etc/passwd'


def _tar(files, mode='w'):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for name, data in files.items():
      member = name if name is LINK else tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return buffer.getvalue()


@pytest.fixture
def manual(tmp_path):
  folder = tmp_path / 'downloads' / 'manual'
  folder.mkdir(parents=True)
  return folder


@pytest.fixture
def cifar(monkeypatch):
  """The archive, with a member that points out of it."""
  files = {'../../../../evil': b'x'}
  for name in reversed(FILES):  # official tars are not in order either
    files[f'cifar-10-batches-bin/{name}'] = RECORDS[name].tobytes()
  data = _tar(files, 'w:gz')
  monkeypatch.setattr(prepare, 'CIFAR_SHA', hashlib.sha256(data).hexdigest())
  return data


def test_cifar_is_its_archive_in_the_layout_of_tfds(tmp_path, manual, cifar):
  (manual / CIFAR).write_bytes(cifar)
  dataset = open_dataset('tfds:cifar10', data_dir=str(tmp_path))
  for split, expected in (('train', PIXELS[:20]), ('test', PIXELS[20:])):
    by_name = {record.name: record for record in getattr(dataset, split)}
    assert len(by_name) == len(expected)
    for i, record in enumerate(expected):
      stored = by_name[f'{split}_{i:05d}']
      assert stored.label == record[0]
      planes = decode_image(stored.image).transpose(2, 0, 1)
      np.testing.assert_array_equal(planes.reshape(-1), record[1:])
  assert not list(tmp_path.rglob('*evil*'))
  builder = tfds.builder_from_directory(str(tmp_path / 'cifar10' / '3.0.2'))
  features = builder.info.features
  assert set(features) == {'id', 'image', 'label'}
  assert features['image'].shape == (32, 32, 3)
  assert features['label'].names[6] == 'frog'


def test_cifar_of_tensorflow_is_prepared_beside_it(tmp_path, manual, cifar):
  (manual / CIFAR).write_bytes(cifar)
  theirs = Path(prepare.prepare('cifar10', str(tmp_path)))
  as_tfrecord(theirs)
  before = sorted(path.name for path in theirs.iterdir())
  for _ in range(2):  # prepares, and finds
    dataset = open_dataset('tfds:cifar10', data_dir=str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (20, 3)
  assert sorted(path.name for path in theirs.iterdir()) == before


def test_only_a_whole_archive_is_downloaded_and_used(
  tmp_path, manual, cifar, monkeypatch
):
  served, ours = tmp_path / CIFAR, manual / CIFAR
  monkeypatch.setattr(prepare, 'CIFAR_URL', served.as_uri())
  for content in (None, cifar[:100]):
    if content:
      served.write_bytes(content)
    with one_line(f'put it at {ours}'):
      prepare.prepare('cifar10', str(tmp_path))
    assert os.listdir(manual) == []
  ours.write_bytes(cifar + b'x')
  with one_line(prepare.CIFAR_SHA):
    prepare.prepare('cifar10', str(tmp_path))
  assert not (tmp_path / 'cifar10' / '3.0.2').exists()
  ours.unlink()
  served.write_bytes(cifar)
  prepare.prepare('cifar10', str(tmp_path))
  assert os.listdir(manual) == [CIFAR]


def test_a_set_that_cannot_be_prepared_says_how_it_can(tmp_path):
  for name in ('cifar10:9.9.9', 'nosuch'):
    with one_line(f'tfds build .*{tmp_path}'):
      open_dataset(f'tfds:{name}', data_dir=str(tmp_path))
  assert not os.listdir(tmp_path)
  (tmp_path / 'file').write_text('')
  with one_line('cannot write to .*data_dir'):
    _prepare_toy(str(tmp_path / 'file'))


def _jpeg(i):
  return encoded(Image.new('RGB', (8, 8), (i * 5, 0, 0)), 'JPEG')


TRAIN = {
  f'{wnid}.tar': _tar({f'{wnid}_{i}.JPEG': _jpeg(i) for i in range(3)})
  for wnid in reversed(CLASSES)
}
# In the official tar the images are not in order of their numbers.
VAL = {f'ILSVRC2012_val_{i:08d}.JPEG': _jpeg(i) for i in (3, 1, 2)}


def _put(manual):
  for name, files in zip(prepare.IMAGENET_ARCHIVES, (TRAIN, VAL), strict=True):
    (manual / name).write_bytes(_tar(files))


def test_imagenet_jpegs_are_untouched_and_labelled(tmp_path, manual):
  archives = [str(manual / name) for name in prepare.IMAGENET_ARCHIVES]
  with one_line(' and '.join(archives)):
    open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  _put(manual)
  dataset = open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  assert {record.name: record[:2] for record in dataset.train} == {
    f'{wnid}_{i}.JPEG': (_jpeg(i), label)
    for wnid, label in CLASSES.items()
    for i in range(3)
  }
  labels = {int(x.name[15:23]): x.label for x in dataset.validation}
  assert labels == VALIDATION


@pytest.mark.parametrize(
  'which, files, message',
  [
    (0, {'../n01440764.tar': _tar({})}, 'the official archive lacks'),
    (0, {'/n01440764.tar': _tar({})}, 'the official archive lacks'),
    (0, {'n01440764.tar': _tar({'../../x.JPEG': b''})}, r"'\.\./\.\./x"),
    (0, {'n00000000.tar': _tar({'x.JPEG': b''})}, 'n00000000'),
    (1, {'holiday.JPEG': _jpeg(0)}, 'holiday'),
    (1, {LINK: b''}, 'the official archive lacks'),
    (0, {}, 'holds no images'),
    (0, None, 'not a complete tar archive'),
  ],
)
def test_a_wrong_archive_is_refused(tmp_path, manual, which, files, message):
  _put(manual)
  path = manual / prepare.IMAGENET_ARCHIVES[which]
  half = path.read_bytes()[: path.stat().st_size // 2]
  path.write_bytes(half if files is None else _tar(files))
  with one_line(message):
    prepare.prepare('imagenet2012', str(tmp_path))
  assert not (tmp_path / 'imagenet2012' / '5.1.0').exists()


def _prepare_toy(data_dir, count=12, read=lambda i: i, shard_size=4):
  """Prepares a set of records that hold their own number; returns its path."""

  def example(i):
    return {'image': _jpeg(0), 'id': f'{read(i)}'}

  features = {'image': tfds.features.Image(), 'id': tfds.features.Text()}
  splits = {s: (range(count), example) for s in ('train', 'test')}
  return prepare.write_tfds(
    'toy', '1.0.0', data_dir, lambda: (features, splits), shard_size=shard_size
  )


def _numbers(folder, split):
  dataset = open_dataset('tfds:toy', data_dir=str(folder))
  return sorted(int(record.name) for record in getattr(dataset, split))


def test_records_are_in_tfds_order_whatever_the_shards(tmp_path):
  """tfds's order: md5 of the split's name followed by the key."""

  def hashed(i):
    return hashlib.md5(b'train' + str(i).encode()).hexdigest()

  for shard_size, shards in ((5, 3), (100, 1)):
    folder = tmp_path / str(shard_size)
    directory = _prepare_toy(str(folder), shard_size=shard_size)
    assert sum('-train.' in f for f in os.listdir(directory)) == shards
    train = open_dataset('tfds:toy', data_dir=str(folder)).train
    assert [int(r.name) for r in train] == sorted(range(12), key=hashed)


def test_an_interrupted_preparation_resumes_after_the_last_shard(tmp_path):
  reads = []

  def interrupted(i):
    reads.append(i)
    if len(reads) == 11:
      raise KeyboardInterrupt
    return i

  with pytest.raises(KeyboardInterrupt):
    _prepare_toy(str(tmp_path), read=interrupted)
  assert not (tmp_path / 'toy' / '1.0.0').exists()
  _prepare_toy(str(tmp_path), read=interrupted)
  assert len(reads) == 11 + 4 + 12  # two of six shards were there
  assert os.listdir(tmp_path / 'toy') == ['1.0.0']
  for split in ('train', 'test'):
    assert _numbers(tmp_path, split) == list(range(12))


def _prepare_slowly(data_dir):
  _prepare_toy(data_dir, 100, lambda i: time.sleep(0.01) or i)


@pytest.mark.slow
def test_a_killed_preparation_resumes_and_two_at_once_do_no_harm(tmp_path):
  context = multiprocessing.get_context('spawn')
  arguments = {'target': _prepare_slowly, 'args': (str(tmp_path),)}
  first, *others = [context.Process(**arguments) for _ in range(3)]
  first.start()
  shard = tmp_path / '.toy-1.0.0-incomplete/toy-train.array_record-00003'
  deadline = time.monotonic() + 60
  while not shard.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  first.kill()
  first.join()
  assert not (tmp_path / 'toy' / '1.0.0').exists()
  for run in others:
    run.start()
  for run in others:
    run.join(60)
    assert run.exitcode == 0
  assert _numbers(tmp_path, 'train') == list(range(100))
  assert not list(tmp_path.glob('.toy*incomplete*'))


def test_a_full_disk_is_one_line_and_the_rest_resumes(make_disk):
  disk = make_disk('4m')
  (disk / 'other').write_bytes(bytes(3_600_000))
  with one_line('No space left .*it resumes', OSError):
    _prepare_toy(str(disk), 100, shard_size=25)
  (disk / 'other').unlink()
  _prepare_toy(str(disk), 100, shard_size=25)
  assert _numbers(disk, 'train') == list(range(100))
