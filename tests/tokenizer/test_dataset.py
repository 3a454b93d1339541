"""A data set as a folder of tokens, and back."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import grain
import jax
import numpy as np
import pytest
from errors import one_line
from jax.experimental import multihost_utils
from PIL import Image

from rvq_jax.data.datasets import open_images
from rvq_jax.data.transforms import decode_image, resize_and_center_crop
from rvq_jax.io import lock
from rvq_jax.tokenizer import encoding, tiling
from rvq_jax.tokenizer.dataset import TokenDataset, decode_dataset
from rvq_jax.tokenizer.encoding import encode_dataset
from rvq_jax.tokenizer.tokenizer import Tokenizer

FILES = ['ids.npy', 'labels.npy', 'meta.json', 'names.txt']


@pytest.fixture(scope='module')
def source(image_folder):
  """40 images of two classes."""
  return open_images(str(image_folder))['train']


@pytest.fixture(scope='module')
def shared_tokens(make_tokenizer, source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('made') / 'tokens'
  encode_dataset(make_tokenizer(), source, folder)
  return folder


@pytest.fixture
def tokens(shared_tokens, make_tokenizer, tmp_path):
  """A tokenizer, and a copy of the folder of its tokens."""
  folder = shutil.copytree(shared_tokens, tmp_path / 'tokens')
  return make_tokenizer(), folder


@pytest.fixture(autouse=True)
def batches_of_eight(monkeypatch):
  monkeypatch.setattr(encoding, 'batch_size', lambda size: 8)


@pytest.fixture
def numbered(tmp_path, photograph):
  """Returns a function of a count and of the images that are damaged."""

  def make(count, *damaged):
    (tmp_path / 'in').mkdir()
    for i in range(count):
      path = tmp_path / 'in' / f'{i:03}.png'
      Image.fromarray(photograph(16, 20, i)).save(path)
      if i in damaged:
        path.write_bytes(b'no image')
    return open_images(str(tmp_path / 'in'))['all']

  return make


def content(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_plain_numpy_reads_ids_labels_and_names(tokens, source):
  tokenizer, folder = tokens
  assert sorted(content(folder)) == FILES
  ids = np.load(folder / 'ids.npy', mmap_mode='r', allow_pickle=False)
  labels = np.load(folder / 'labels.npy', allow_pickle=False)
  assert (ids.dtype, ids.shape) == (np.uint8, (40, 4, 4))
  assert labels.dtype == np.int32
  images = np.zeros((256, 16, 16, 3), np.uint8)
  for i, record in enumerate(source):
    images[i] = resize_and_center_crop(decode_image(record.image), 16)
  np.testing.assert_array_equal(ids, tokenizer.encode(images)[:40])
  assert labels.tolist() == [record.label for record in source]
  names = (folder / 'names.txt').read_text().splitlines()
  assert names == [record.name for record in source]
  meta = json.loads((folder / 'meta.json').read_text())
  about = tokenizer.about_ids() | {'codebook_size': 16, 'factor': 4}
  about |= {'num_images': 40, 'rows_done': 40, 'grid': [4, 4], 'skipped': []}
  assert meta | about == meta


@pytest.mark.parametrize(
  ('quantizer', 'grid', 'offsets'),
  [('residual', [4, 4, 4], None), ('multiscale', [26], [0, 1, 10, 26])],
)
def test_codes_of_a_position_are_an_axis_and_scales_have_offsets(
  make_tokenizer, numbered, tmp_path, quantizer, grid, offsets
):
  tokenizer = make_tokenizer(quantizer=quantizer)
  encode_dataset(tokenizer, numbered(4), tmp_path / 'tokens')
  tokens = TokenDataset(tmp_path / 'tokens')
  assert tokens.ids.shape == (4, *grid) and tokens.meta['grid'] == grid
  assert tokens.meta.get('offsets') == offsets
  assert tokens.meta.get('sides') == (offsets and [1, 3, 4])
  assert decode_dataset(tokenizer, tmp_path / 'tokens', tmp_path / 'out') == 4


@pytest.mark.parametrize(('batch', 'devices'), [(16, 8), (12, 6), (5, 5)])
def test_every_device_encodes_an_equal_share(
  make_tokenizer, source, tmp_path, monkeypatch, shared_tokens, batch, devices
):
  encode, shares = Tokenizer.encode, []

  def seen(tokenizer, images):
    shares.append([x.data.shape[0] for x in images.addressable_shards])
    return encode(tokenizer, images)

  monkeypatch.setattr(Tokenizer, 'encode', seen)
  monkeypatch.setattr(encoding, 'batch_size', lambda size: batch)
  encode_dataset(make_tokenizer(), source, tmp_path / 'tokens')
  assert shares == [[batch // devices] * devices] * -(-len(source) // batch)
  assert content(tmp_path / 'tokens') == content(shared_tokens)


def test_it_is_a_grain_source_also_for_worker_processes(tokens):
  stored = TokenDataset(tokens[1])
  assert isinstance(stored.ids, np.memmap) and len(stored) == 40
  batch = grain.MapDataset.source(stored).batch(10)[1]
  np.testing.assert_array_equal(batch['ids'], stored.ids[10:20])
  assert batch['label'].tolist() == stored.labels[10:20].tolist()
  assert batch['name'].tolist() == stored.names[10:20]
  function, arguments = stored.__reduce__()  # how a worker gets it
  np.testing.assert_array_equal(function(*arguments)[7]['ids'], stored.ids[7])
  assert repr(stored) == repr(function(*arguments))


def test_ids_come_in_the_dtype_asked_for_also_in_pytorch(tokens):
  assert TokenDataset(tokens[1])[0]['ids'].dtype == np.uint8  # as stored
  stored = TokenDataset(tokens[1], dtype=np.int32)
  function, arguments = stored.__reduce__()
  assert function(*arguments)[0]['ids'].dtype == np.int32
  for dtype in (np.float32, bool, 'x'):
    with one_line('dtype: expected an integer .* holds 15, got '):
      TokenDataset(tokens[1], dtype=dtype)
  data = pytest.importorskip('torch.utils.data')
  batch = next(iter(data.DataLoader(stored, batch_size=4)))
  assert str(batch['ids'].dtype) == 'torch.int32'
  np.testing.assert_array_equal(batch['ids'].numpy(), stored.ids[:4])


def test_an_interrupted_encoding_resumes_to_the_same_files(
  make_tokenizer, numbered, tmp_path, monkeypatch
):
  source, tokenizer = numbered(102, 3), make_tokenizer()
  encode_dataset(tokenizer, source, tmp_path / 'whole')
  stop = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt, *[mock.DEFAULT] * 12]
  encode = mock.Mock(wraps=tiling.encode_images, side_effect=stop)
  monkeypatch.setattr(tiling, 'encode_images', encode)
  folder = tmp_path / 'tokens'
  with pytest.raises(KeyboardInterrupt):
    encode_dataset(tokenizer, source, folder)
  with one_line('has 16 of 102 rows; start the same'):
    TokenDataset(folder)
  before = encode.call_count  # the fourth batch may have been begun
  encode_dataset(tokenizer, source, folder)
  assert encode.call_count - before == 11  # of 13
  assert content(folder) == content(tmp_path / 'whole')


def test_a_batch_is_encoded_while_the_one_before_it_is_written(
  make_tokenizer, source, tmp_path, monkeypatch
):
  encode, write = mock.Mock(wraps=tiling.encode_images), encoding.write_atomic

  def write_atomic(path, content):
    rows = json.loads(content)['rows_done'] if path.name == 'meta.json' else 0
    end = time.monotonic() + 60
    while 0 < rows < len(source) and encode.call_count <= rows // 8:
      assert time.monotonic() < end, 'the model waits for the disk'
      time.sleep(0.01)
    write(path, content)

  monkeypatch.setattr(tiling, 'encode_images', encode)
  monkeypatch.setattr(encoding, 'write_atomic', write_atomic)
  encode_dataset(make_tokenizer(), source, tmp_path / 'tokens')


@pytest.mark.parametrize(
  ('count', 'images', 'damaged'),
  [(2, 206, (7, 203)), (2, 206, (7, 8, 203)), (5, 20, ())],
)
def test_the_shares_of_processes_are_joined_to_the_files_of_one(
  make_tokenizer, numbered, tmp_path, monkeypatch, count, images, damaged
):
  source, tokenizer = numbered(images, *damaged), make_tokenizer()
  over = len(damaged) > 2 and one_line('3 of 206 images cannot be decoded')
  with over or contextlib.nullcontext():
    encode_dataset(tokenizer, source, tmp_path / 'whole')
  process = None

  def sync(_):
    if process:  # the first, which joins, is the last here
      raise KeyboardInterrupt

  monkeypatch.setattr(multihost_utils, 'sync_global_devices', sync)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  for process in reversed(range(count)):  # noqa: B007
    with contextlib.suppress(KeyboardInterrupt):
      if over and not process:  # the last, which joins
        with one_line('3 of 206 images cannot be decoded'):
          encode_dataset(tokenizer, source, tmp_path / 'tokens')
        return
      encode_dataset(tokenizer, source, tmp_path / 'tokens')
  assert content(tmp_path / 'tokens') == content(tmp_path / 'whole')
  encode_dataset(tokenizer, source, tmp_path / 'tokens')  # finds it complete
  assert {x.name for x in tmp_path.iterdir()} == {'in', 'tokens', 'whole'}


KILLED = """
import itertools, os, sys
import rvq_jax.tokenizer.encoding as encoding
from rvq_jax import load
from rvq_jax.data.datasets import open_images

workdir, images, folder, at = sys.argv[1:]
encoding.batch_size = lambda size: 8
opened = itertools.count(1)

def kill_at(event, arguments):
  ours = event == 'open' and os.path.dirname(folder) in str(arguments[0])
  if ours and next(opened) == int(at):
    os.kill(os.getpid(), 9)

tokenizer, source = load(workdir), open_images(images)['train']
sys.addaudithook(kill_at)
encoding.encode_dataset(tokenizer, source, folder)
"""


@pytest.mark.slow
def test_kills_at_any_time_end_in_equal_files(tiny_run, image_folder, tmp_path):
  def run(folder, at):
    """Encodes in a process that is killed when it opens its at-th file."""
    return subprocess.run(
      [sys.executable, '-c', KILLED, tiny_run, image_folder, folder, str(at)],
      env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
      cwd=Path(__file__).resolve().parents[2],
      timeout=280,
    ).returncode

  assert run(tmp_path / 'whole', 0) == 0
  codes = [run(tmp_path / 'tokens', at) for at in (1, 2, 4, 5, 9, 12, 14, 15)]
  assert codes == [-9] * 8
  assert run(tmp_path / 'tokens', 0) == 0
  assert content(tmp_path / 'tokens') == content(tmp_path / 'whole')
  assert {path.name for path in tmp_path.iterdir()} == {'tokens', 'whole'}


def test_the_folder_of_another_encoding_is_refused_and_kept(
  tokens, source, make_tokenizer, image_folder, tmp_path
):
  tokenizer, folder = tokens
  before = content(folder)
  renamed = shutil.copytree(image_folder, tmp_path / 'copy')
  path = renamed / 'train/class0/000.png'
  path.rename(renamed / 'train/class1/999.png')
  renamed = open_images(str(renamed))['train']
  other = make_tokenizer(seed=5)
  for name, *arguments, changed in (
    ('model_hash', other, source, {}),
    ('image_size', tokenizer, source, {'image_size': 12}),
    ('source_digest', tokenizer, renamed, {}),
  ):
    with one_line(f'expected {name} '):
      encode_dataset(*arguments, folder, **changed)
  assert content(folder) == before


@pytest.mark.parametrize('change', ['where', 'pixels', 'earlier'])
def test_a_source_is_what_its_files_are_and_not_where_they_lie(
  make_tokenizer, numbered, tmp_path, monkeypatch, change
):
  numbered(9)
  tokenizer, folder = make_tokenizer(), tmp_path / 'tokens'

  def encode(name):
    source = open_images(name)['all']
    encode_dataset(tokenizer, source, folder, about={'input': name})

  encode(str(tmp_path / 'in'))
  meta, before = folder / 'meta.json', content(folder)
  if change == 'earlier':  # folders had no such field
    about = json.loads(meta.read_text())
    del about['source_files']
    meta.write_text(json.dumps(about))
  if change == 'pixels':
    path = tmp_path / 'in/003.png'
    path.write_bytes((tmp_path / 'in/004.png').read_bytes())
    with one_line('expected source_files '):
      encode(str(tmp_path / 'in'))
    assert content(folder) == before
    return
  monkeypatch.chdir(tmp_path)
  for name in ('in', 'in/', './in', 'folder:in'):
    encode(name)
  (tmp_path / 'in').rename('moved')
  encode('moved')
  assert content(folder).keys() == before.keys()
  after = json.loads(meta.read_text())
  first = json.loads(before['meta.json'])
  assert first == first | after


@pytest.mark.parametrize('processes', [1, 2])
def test_a_folder_or_file_of_the_user_is_not_written_to(
  tokens, source, tmp_path, monkeypatch, processes
):
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  mine = tmp_path / 'mine'
  mine.mkdir()
  (mine / 'a.txt').write_text('mine')
  for output in (mine, mine / 'a.txt'):
    with one_line('expected a new or empty folder'):
      encode_dataset(tokens[0], source, output)
    with one_line('expected a new or empty folder'):
      decode_dataset(*tokens, output)
  with one_line('cannot write to .*Not a directory'):
    encode_dataset(tokens[0], source, mine / 'a.txt' / 'tokens')
  assert content(mine) == {'a.txt': b'mine'}
  assert {x.name for x in tmp_path.iterdir()} == {'mine', 'tokens'}


@pytest.mark.parametrize('name', ['new', 'tokens'])
def test_a_folder_that_another_process_encodes_is_refused(
  tokens, source, tmp_path, name
):
  (tmp_path / name).mkdir(exist_ok=True)
  before = content(tokens[1])
  with lock(tmp_path / name, 'it', 'wait'):  # as the other process does
    with one_line(f'/{name} is in use'):
      encode_dataset(tokens[0], source, tmp_path / name)
  assert content(tokens[1]) == before
  encode_dataset(tokens[0], source, tmp_path / name)


def test_a_folder_is_locked_until_its_encoding_ends(
  make_tokenizer, source, tmp_path, monkeypatch
):
  def encode_rows(tokenizer, source, folder, meta):
    with one_line('is in use'):
      encode_dataset(tokenizer, source, folder)
    raise KeyboardInterrupt

  monkeypatch.setattr(encoding, '_encode_rows', encode_rows)
  with pytest.raises(KeyboardInterrupt):
    encode_dataset(make_tokenizer(), source, tmp_path / 'tokens')


def test_a_volume_takes_tokens_and_images(make_tokenizer, source, volume):
  encode_dataset(make_tokenizer(), source, volume)
  assert sorted(content(volume)) == FILES
  decode_dataset(make_tokenizer(), volume, volume / 'images')


@pytest.mark.parametrize('rest', ['.meta.json.7.partial', 'meta.json'])
def test_an_encoding_that_was_killed_while_it_began_resumes(
  tokens, source, tmp_path, rest
):
  folder = tmp_path / 'killed'
  folder.mkdir()
  meta = json.loads((tokens[1] / 'meta.json').read_text()) | {'rows_done': -1}
  (folder / rest).write_text(json.dumps(meta))
  (folder / 'ids.npy').write_text('half') if rest == 'meta.json' else None
  encode_dataset(tokens[0], source, folder)
  assert content(folder) == content(tokens[1])


def test_a_folder_that_cannot_be_filled_leaves_nothing(
  make_tokenizer, source, tmp_path, monkeypatch
):
  full = mock.Mock(side_effect=OSError(28, 'No space left on device'))
  monkeypatch.setattr(encoding, 'write_atomic', full)
  with pytest.raises(OSError, match='No space left'):
    encode_dataset(make_tokenizer(), source, tmp_path / 'tokens')
  assert not list(tmp_path.iterdir())


def test_an_undecodable_image_has_ids_0_and_a_reason(
  make_tokenizer, numbered, tmp_path, caplog
):
  source, tokenizer = numbered(120, 5), make_tokenizer()
  folder = tmp_path / 'tokens'
  (skipped,) = encode_dataset(tokenizer, source, folder)['skipped']
  assert skipped['row'] == 5 and '005.png' in skipped['reason']
  assert len(caplog.messages) == 1 and skipped['reason'] in caplog.text
  stored = TokenDataset(folder)
  assert not stored.ids[5].any() and stored.ids[6].any()
  # It is no item: a generative model would learn it as an image.
  rows = [i for i in range(120) if i != 5]
  assert len(stored) == 119 and stored.rows.tolist() == rows
  batch = grain.MapDataset.source(stored).batch(119)[0]
  assert batch['name'].tolist() == [f'{i:03}.png' for i in rows]
  np.testing.assert_array_equal(batch['ids'], stored.ids[rows])
  assert stored[-1]['name'] == '119.png'
  assert decode_dataset(tokenizer, folder, tmp_path / 'out') == 119
  assert not (tmp_path / 'out' / '00000005.png').exists()


def test_over_one_percent_undecodable_ends_the_encoding(
  make_tokenizer, numbered, tmp_path
):
  source, tokenizer = numbered(150, 5, 100), make_tokenizer()
  for _ in range(2):  # the one before the interruption counts
    with one_line('2 of 150 images cannot be decoded'):
      encode_dataset(tokenizer, source, tmp_path / 'tokens')


def test_a_folder_decodes_to_reconstructions(tokens, make_tokenizer, tmp_path):
  tokenizer, folder = tokens
  with one_line('expected the encoder'):
    decode_dataset(make_tokenizer(seed=5), folder, tmp_path / 'out')
  assert decode_dataset(tokenizer, folder, tmp_path / 'out') == 40
  ids = np.resize(np.load(folder / 'ids.npy'), (256, 4, 4))
  expected = tiling.decode_ids(tokenizer, ids, 16, 16)
  for i in range(40):
    image = np.asarray(Image.open(tmp_path / 'out' / f'{i:08d}.png'))
    np.testing.assert_array_equal(image, expected[i])


@pytest.mark.parametrize('size', [20000, 8196, 0, -4])
def test_a_size_that_would_fill_the_memory_is_refused_first(
  make_tokenizer, source, tmp_path, size
):
  with one_line(f'image_size: expected 1 to 8192 pixels, got {size}'):
    encode_dataset(make_tokenizer(), source, tmp_path / 'x', image_size=size)
  assert not list(tmp_path.iterdir())


LIES = [('format', 'x'), ('num_images', 41), ('num_images', '40')]
LIES += [('codebook_size', 257), ('codebook_size', None), ('grid', [4, 5])]
LIES += [('grid', 4), ('rows_done', 50), ('rows_done', '40')]
LIES += [('skipped', [{'row': 40}]), ('skipped', [5])]


@pytest.mark.parametrize(('field', 'value'), LIES)
def test_metadata_that_lies_is_refused(tokens, field, value):
  path = tokens[1] / 'meta.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with one_line('holds no tokens, or damaged ones'):
    TokenDataset(tokens[1])


def test_an_id_of_k_is_refused(tokens):
  ids = np.load(tokens[1] / 'ids.npy', mmap_mode='r+')
  ids[3] = 16
  with one_line('expected ids below 16, got 16'):
    TokenDataset(tokens[1])[3]


@pytest.mark.parametrize('name', FILES)
def test_a_damaged_file_is_refused(tokens, source, name):
  tokenizer, folder = tokens
  whole, pickled = (folder / name).read_bytes(), io.BytesIO()
  np.save(pickled, np.array([{}] * 40), allow_pickle=True)
  for damaged in (whole[: len(whole) // 2], b'', pickled.getvalue(), None):
    (folder / name).unlink()
    if damaged is not None:
      (folder / name).write_bytes(damaged)
    with one_line('holds no tokens, or damaged ones'):
      TokenDataset(folder)
    if (folder / 'meta.json').exists():  # else it is no folder of tokens
      with one_line('holds no tokens, or damaged ones'):
        encode_dataset(tokenizer, source, folder)


def test_a_full_disk_is_one_line_and_resumes(
  make_disk, make_tokenizer, numbered, tmp_path
):
  source, tokenizer = numbered(100), make_tokenizer(widths=(2, 2))
  encode_dataset(tokenizer, source, tmp_path / 'whole', image_size=256)
  disk = make_disk('300k')  # for half of the ids
  with one_line(f'^No space left .*{disk}.*same command again', OSError):
    encode_dataset(tokenizer, source, disk / 'tokens', image_size=256)
  subprocess.run(['mount', '-o', 'remount,size=8m', str(disk)], check=True)
  encode_dataset(tokenizer, source, disk / 'tokens', image_size=256)
  assert content(disk / 'tokens') == content(tmp_path / 'whole')
