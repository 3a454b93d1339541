"""ImageNet from tiny archives of the official shape."""

import io
import tarfile

import pytest
from PIL import Image

from rvq_jax.data import imagenet
from rvq_jax.data.builders import prepare_recipe
from rvq_jax.data.datasets import open_dataset

# The first, second and last class in the official order.
CLASSES = {'n01440764': 0, 'n01443537': 1, 'n15075141': 999}
# Labels of the first three validation images, from the development kit.
VALIDATION = {1: 65, 2: 970, 3: 230}


def _jpeg(i):
  buffer = io.BytesIO()
  Image.new('RGB', (8, 8), (i * 5, 0, 0)).save(buffer, 'JPEG')
  return buffer.getvalue()


def _tar(files):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return buffer.getvalue()


def _train():
  return {
    f'{wnid}.tar': _tar({f'{wnid}_{i}.JPEG': _jpeg(i) for i in range(3)})
    for wnid in reversed(CLASSES)
  }


def _validation():
  # In the official tar the images are not in order of their numbers.
  return {f'ILSVRC2012_val_{i:08d}.JPEG': _jpeg(i) for i in (3, 1, 2)}


@pytest.fixture
def put(tmp_path):
  """Returns a function that puts the two archives where they are expected."""
  manual = tmp_path / 'downloads' / 'manual'
  manual.mkdir(parents=True)

  def write(train=None, validation=None):
    train = _tar(_train() if train is None else train)
    validation = _tar(_validation() if validation is None else validation)
    (manual / imagenet.TRAIN).write_bytes(train)
    (manual / imagenet.VALIDATION).write_bytes(validation)
    return manual

  return write


def _prepare(tmp_path, **options):
  return prepare_recipe(imagenet.RECIPE, str(tmp_path), **options)


def test_jpegs_are_untouched_and_labelled_by_class(tmp_path, put):
  put()
  dataset = open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  found = {record.name: record for record in dataset.train}
  assert len(found) == 9
  for wnid, label in CLASSES.items():
    for i in range(3):
      record = found[f'{wnid}_{i}.JPEG']
      assert record.label == label
      assert record.image == _jpeg(i)


def test_validation_labels_go_by_the_number_in_the_name(tmp_path, put):
  put()
  dataset = open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  assert {
    int(record.name[15:23]): record.label for record in dataset.validation
  } == VALIDATION


def test_layout_is_that_of_tfds(tmp_path, put):
  put()
  directory = _prepare(tmp_path, num_shards=3)
  assert directory == str(tmp_path / 'imagenet2012' / '5.1.0')


def test_missing_archives_are_named_with_their_place(tmp_path):
  with pytest.raises(ValueError, match='image-net.org') as error:
    open_dataset('tfds:imagenet2012', data_dir=str(tmp_path))
  for name in (imagenet.TRAIN, imagenet.VALIDATION):
    assert str(tmp_path / 'downloads' / 'manual' / name) in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name', ['../n01440764.tar', '/n01440764.tar', 'a/../b']
)
def test_names_that_point_out_of_the_archive_are_refused(tmp_path, put, name):
  put(train={name: _tar({})})
  with pytest.raises(ValueError, match='unsafe name'):
    _prepare(tmp_path)


def test_unsafe_names_of_images_are_refused(tmp_path, put):
  put(train={'n01440764.tar': _tar({'../../x.JPEG': _jpeg(0)})})
  with pytest.raises(ValueError, match='unsafe name'):
    _prepare(tmp_path)


def test_links_are_refused(tmp_path, put):
  manual = put()
  with tarfile.open(manual / imagenet.VALIDATION, 'w') as archive:
    link = tarfile.TarInfo('ILSVRC2012_val_00000001.JPEG')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    archive.addfile(link)
  with pytest.raises(ValueError, match='is not a file'):
    _prepare(tmp_path)


def test_unknown_class_is_named(tmp_path, put):
  put(train={'n00000000.tar': _tar({'x.JPEG': _jpeg(0)})})
  with pytest.raises(ValueError, match='n00000000'):
    _prepare(tmp_path)


def test_unknown_validation_image_is_named(tmp_path, put):
  put(validation={'holiday.JPEG': _jpeg(0)})
  with pytest.raises(ValueError, match='holiday'):
    _prepare(tmp_path)


def test_truncated_archive_is_refused_and_prepares_nothing(tmp_path, put):
  manual = put()
  whole = (manual / imagenet.TRAIN).read_bytes()
  (manual / imagenet.TRAIN).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match='not a complete tar archive'):
    _prepare(tmp_path)
  assert not (tmp_path / 'imagenet2012' / '5.1.0').exists()


def test_empty_archive_is_refused(tmp_path, put):
  put(train={})
  with pytest.raises(ValueError, match='holds no images'):
    _prepare(tmp_path)
