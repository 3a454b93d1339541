"""Tars, Parquet, `datasets`: the batches of tfds, and faults in one line."""

import gzip
import io
import json
import logging
import lzma
import pickle
import subprocess
import sys
import tarfile
import tempfile
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from errors import one_line
from tiny_data import encoded, ids, noise, numbered

from examples import shards
from rvq_jax.data import tars
from rvq_jax.data.datasets import open_dataset, open_images
from rvq_jax.data.loaders import eval_batches, make_train_loader
from rvq_jax.data.prepare import write_tfds
from rvq_jax.data.sources import SPLITS, Record, Source
from rvq_jax.data.transforms import decode_image
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.explorer import page
from rvq_jax.tokenizer.encoding import encode_dataset
from rvq_jax.tokenizer.load import load
from rvq_jax.training.build import RunData, shared_config
from rvq_jax.training.config import check_config

every_kind = pytest.mark.parametrize('kind', ['wds', 'parquet', 'hf'])


class Numbered(Source):
  """Numbered images; those in `bad` are none."""

  def __init__(self, rows, bad=()):
    self.rows, self.bad = rows, bad
    self.labels = np.array([i % 3 for i in rows], np.int32)

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    row = self.rows[i]
    image = b'no image' if row in self.bad else encoded(numbered(row))
    return Record(image, row % 3, '')


class Hub(types.ModuleType):
  """In the place of `datasets`, which keeps Arrow files in a cache."""

  __version__ = '4.0.0'

  def load_dataset(self, name, *config, revision):
    if name != 'me/set':
      raise RuntimeError('no such set\nanywhere')
    self.asked = *config, revision
    return {
      x: types.SimpleNamespace(cache_files=[{'filename': y} for y in files])
      for x, files in self.splits.items()
    }

  def load_from_disk(self, path):
    return self.load_dataset('me/set', revision=path)['train']


@pytest.fixture
def hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', Hub('datasets'))
  sys.modules['datasets'].splits = {}
  return sys.modules['datasets']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache/rvq_jax/tars'


@pytest.fixture
def write(tmp_path, hub):
  """Returns a function: kind, sources by split -> name of them as shards."""

  def make(kind, sources, folder='set'):
    form = 'parquet' if kind == 'hf' else kind
    name = shards.write(sources, tmp_path / folder / form, form, 3)
    files = sorted((tmp_path / folder / form).glob('*.parquet'))
    for file in files if kind == 'hf' else ():
      split = {'validation': 'val'}.get(*[file.stem[:-6]] * 2)
      rows, path = pq.read_table(file), file.with_suffix('.arrow')
      with pa.ipc.new_stream(path, rows.schema) as stream:
        stream.write_table(rows, 5)
      hub.splits.setdefault(split, []).append(str(path))
    return 'hf:me/set' if kind == 'hf' else name

  return make


def parts(data):
  return [getattr(data, split) for split in SPLITS]


def tar(path, members, form=tarfile.PAX_FORMAT):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=form) as archive:
    for name, data in members.items():
      member = tarfile.TarInfo(name)
      member.size, member.mtime = len(data), 1.5  # needs a header of PAX
      archive.addfile(member, io.BytesIO(data))


def example(i):
  return {f'{i:04d}.png': encoded(numbered(i)), f'{i:04d}.cls': b'%d\n' % i}


@every_kind
def test_records_are_those_written_also_in_workers(write, hub, kind):
  sources = {'train': Numbered(range(20)), 'validation': Numbered(range(9))}
  data = open_dataset(write(kind, sources))
  assert 'validation and test are both' in data.note
  for source, expected in zip(parts(data), sources.values(), strict=False):
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
    for record, other, want in zip(source, copy, expected, strict=True):
      assert record == other and record[:2] == want[:2]
    np.testing.assert_array_equal(source.labels, expected.labels, strict=True)
    assert source.stamps().shape == (len(expected), 2)
    assert [*copy.identity()] == [*source.identity()]
    assert len({*source.identity()}) == len(expected)
  name = {'wds': '00000013', 'parquet': 'train-00001/6', 'hf': '13'}[kind]
  assert data.train[13].name == name
  assert data.names['train'][13] == f'train/{name}'


@every_kind
@pytest.mark.parametrize(
  'crop, workers',
  [('none', 0), pytest.param('random', 2, marks=pytest.mark.slow)],
)
def test_batches_are_those_of_tfds_and_resume(
  tmp_path, write, kind, crop, workers
):
  def read(i):
    return {'image': encoded(noise(20, 30) // (i + 1)), 'label': i % 3}

  features = {'image': tfds.features.Image(), 'label': np.int64}
  splits = {'train': (range(31), read), 'test': (range(5), read)}
  write_tfds('toy', '1.0.0', str(tmp_path / 't'), lambda: (features, splits))
  theirs = open_images('tfds:toy', data_dir=str(tmp_path / 't'))
  ours = open_dataset(write(kind, theirs)).train
  options = {'batch_size': 4, 'image_size': 8, 'seed': 2, 'in_memory': False}
  options |= {'crop': crop}
  whole = make_train_loader(theirs['train'], **options)
  expected = [next(whole)['image'] for _ in range(20)]
  halves = [{'process_index': i, 'process_count': 2} for i in range(2)]
  for step in (0, 9):
    pair = [
      make_train_loader(ours, **options, **half, num_workers=workers)
      for half in halves
    ]
    for loader in pair:
      loader.seek({'step': step, 'images': 31})
    for batch in expected[step:]:
      images = np.concatenate([next(loader)['image'] for loader in pair])
      np.testing.assert_array_equal(images, batch)
    for loader in pair:
      loader.close()


@every_kind
def test_the_run_keeps_a_division_by_the_keys_wherever_the_files_lie(
  tmp_path, write, hub, kind
):
  sources = {'train': Numbered(range(150)), 'test': Numbered(range(150, 200))}
  data = open_dataset(write(kind, sources), split='paper')
  assert [len(x) for x in parts(data)] == [140, 40, 20]
  data.write_split(tmp_path / 'split.json')
  hub.splits = {}
  name = write(
    kind, sources | {'validation': Numbered(range(300, 330))}, 'moved'
  )
  again = open_dataset(name, split='paper', split_file=tmp_path / 'split.json')
  for one, two in zip(parts(data), parts(again), strict=True):
    assert [x.image for x in one] == [x.image for x in two]
  hub.splits = {}
  name = write(kind, {x: Numbered(range(9, 159)) for x in sources}, 'other')
  with one_line('of the run are missing'):
    open_dataset(name, split='paper', split_file=tmp_path / 'split.json')


@every_kind
def test_one_percent_that_is_no_image_is_left_out_and_named(
  write, kind, caplog
):
  rows, sizes = range(200), {'batch_size': 4, 'image_size': 8}
  source = open_images(write(kind, {'train': Numbered(rows, [7, 90])}))['train']
  batches = [x['image'][x['mask']] for x in eval_batches(source, **sizes)]
  assert ids(np.concatenate(batches)) == [i for i in rows if i not in (7, 90)]
  assert caplog.text.count('skipped image') == 2
  assert f"image '{source.keys[90]}' cannot be decoded" in caplog.text
  source.set_size = 199
  with one_line('2 of 199 images cannot be decoded, over 1%'):
    list(eval_batches(source, **sizes))


@pytest.mark.parametrize(
  'form', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_members_of_one_stem_are_one_example(tmp_path, form, caplog):
  long = 'deep/' * 20 + 'n' * (90 if form == tarfile.USTAR_FORMAT else 300)
  members = {
    './a.b/0001.json': json.dumps({'label': 7, 'url': 'x'}).encode(),
    './a.b/0001.JPG': b'1',
    './a.b/0001.txt': b'a caption',
    './a.b/0001.seg.png': b'not the image',
    f'{long}.png': b'2',
    '0003.json': b'{"label": "cat"}',
    '0003.png': b'3',
    '0004.cls': b'5\n',
    '0004.png': b'4',
    '0005.txt': b'without an image',
    '._0004.png': b'of a Mac',
  }
  tar(tmp_path / 'x.tar', members, form)
  with tarfile.open(tmp_path / 'x.tar', 'a', format=form) as archive:
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
      link = tarfile.TarInfo('d.png')
      link.type, link.linkname = kind, '0004.png'
      archive.addfile(link)
  with caplog.at_level(logging.INFO):
    source = open_images(f'wds:{tmp_path}/x.tar')['all']
  expected = ('a.b/0001', 7), (long, -1), ('0003', -1), ('0004', 5)
  for i, (name, label) in enumerate(expected, 1):
    assert source[i - 1] == (b'%d' % i, label, name)
  assert len(source) == 4 and 'skipped 1 examples' in caplog.text


def test_an_index_is_built_once_and_anew_for_changed_tars(
  tmp_path, write, cache, caplog
):
  name = write('wds', {'train': Numbered(range(9)), 'test': Numbered(range(9))})
  with caplog.at_level(logging.INFO):
    first = open_images(name)
    [_], [inside] = (tmp_path / 'set/wds').glob('.*'), cache.iterdir()
    inside.unlink()
    open_images(name)  # by the file beside the tars
    assert caplog.text.count('indexing 6 tars, once') == 1
    tar(tmp_path / 'set/wds/test-00000.tar', example(7))
    assert len(open_images(name)['test']) == 7
    assert caplog.text.count('indexing 6 tars, once') == 2
  with one_line('test-00000.tar changed in use; start the same command again'):
    first['test'][0]
  with one_line('the tars changed in use'):
    pickle.loads(pickle.dumps(first['train']))  # noqa: S301, made here
  assert len([*(tmp_path / 'set/wds').glob('.*')]) == 1


@pytest.mark.parametrize('state', ['cut', 'foreign', 'forbidden'])
def test_an_index_that_cannot_be_used_is_no_trouble(
  tmp_path, cache, monkeypatch, write, state
):
  def refuse(path, content):
    raise PermissionError(13, 'Permission denied', str(path))

  name = write('wds', {'train': Numbered(range(9))})
  open_images(name)
  [beside], [inside] = (tmp_path / 'set/wds').glob('.*'), cache.iterdir()
  whole = beside.read_bytes()
  text = whole[:500] if state == 'cut' else b'mine'
  for path in (beside, inside):
    path.unlink() if state == 'forbidden' else path.write_bytes(text)
  if state == 'forbidden':
    monkeypatch.setattr(tars, 'write_atomic', refuse)
  source = open_images(name)['train']
  copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
  assert [*copy] == [*source] and len(copy) == 9
  left = {'cut': [whole], 'foreign': [text], 'forbidden': []}[state]
  assert [x.read_bytes() for x in (tmp_path / 'set/wds').glob('.*')] == left


BOTH, FIRST = {'train': [0], 'validation': [1]}, {'all': [0, 1, 2]}


@pytest.mark.parametrize(
  'names, pattern, splits',
  [
    (['b.tar', 'a.tar', '.c.tar', 'x.txt'], '', {'all': [1, 0]}),
    (['test/a.tar', 'test/b.tar'], 'test', {'all': [0, 1]}),  # where it lies
    (['a/train/0.tar', 'a/val/0.tar'], 'a/*/0.tar', BOTH),
    (['in-train-7.tar', 'in-TEST-7.tar'], '', {'train': [0], 'test': [1]}),
    (['trainer.tar', 'contest.tar'], '', {'all': [1, 0]}),
    (['train.tar', 'extra.tar'], '', {'all': [1, 0]}),
    (['s08.tar', 's09.tar', 's10.tar', 's7.tar'], 's{08..10}.tar', FIRST),
    (['{a,b}.tar', 'a.tar'], '{a,b}.tar', {'all': [0]}),
    (['a1.tar', 'b1.tar', 'b2.tar', 'c.tar'], '{a,b}[1-9].tar', FIRST),
    (['x/a.tar', 'x/b.tar'], '{x/{b,a}.tar,x/a.tar}', {'all': [0, 1]}),
  ],
)
def test_files_and_splits_of_a_pattern(tmp_path, names, pattern, splits):
  for i, name in enumerate(names):
    tar(tmp_path / name, example(i))
  found = open_images(f'wds:{tmp_path}/{pattern}')
  images = {x: [decode_image(y.image) for y in found[x]] for x in found}
  assert {x: ids(np.stack(images[x])) for x in images} == splits


def sparse(_):
  with tempfile.TemporaryDirectory() as folder:
    with open(f'{folder}/hole.png', 'wb') as stream:
      stream.seek(10**6)
      stream.write(b'x')
    pack = ['tar', '-Scf', '-', '-C', folder, 'hole.png']
    return subprocess.run(pack, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
  'message, change',
  [
    ('cut short .* .unexpected end', lambda x: x[:560]),
    ('cut short .* .no end', lambda x: x[:2048]),
    ('cut short .* .empty', lambda x: b''),
    ('cut short .* .data after', lambda x: x[:1030] + b'?' + x[1031:]),
    ('damaged .invalid header', lambda x: b'no tar' * 999),
    ('damaged .data after its end.*restore', lambda x: x + x),
    ("is compressed; unpack it: gzip -d '.*a b.tar'", gzip.compress),
    ('is compressed; unpack it: xz -d ', lzma.compress),
    ('a b.tar holds no images; expected', {'1.txt': b'', '1.cls': b'1'}),
    ('a b.tar holds no images', {}),
    ('two images .*: 1.png and .jpg', {'1.jpg': b'', '1.png': b''}),
    ('a b.tar and .*c.tar both hold 0003: expected diff', None),
    ("a sparse file, hole.png; unpack it: tar -xf '", sparse),
  ],
)
def test_a_bad_tar_is_one_line(tmp_path, message, change):
  path = tmp_path / 'a b.tar'
  tar(path, change if isinstance(change, dict) else example(3), 0)
  if callable(change):
    path.write_bytes(change(path.read_bytes()))
  elif change is None:
    tar(tmp_path / 'c.tar', example(3))
  with one_line(message):
    open_images(f'wds:{tmp_path}')
  assert not [*tmp_path.glob('.*')]


@pytest.mark.parametrize(
  'message, columns',
  [
    ('expected one column of bytes .*, got x, label', {'x': [1], 'label': [1]}),
    ('expected one column .*, got a, b', {'a': [b'1'], 'b': [b'2']}),
    ('x.parquet holds no images', {'image': pa.array([], pa.binary())}),
    ('x.parquet is damaged', {'image': [b'1'], 'label': [2**31]}),
    ('x.parquet is damaged', None),
  ],
)
def test_a_bad_table_is_one_line(tmp_path, message, columns):
  path = tmp_path / 'x.parquet'
  path.write_bytes(b'no table')
  if columns:
    pq.write_table(pa.table(columns), path)
  with one_line(message):
    open_images(f'parquet:{tmp_path}')


@pytest.mark.parametrize('compression', ['none', 'snappy'])
def test_a_table_may_lack_labels_and_images(tmp_path, compression):
  path = tmp_path / 'x.parquet'
  image = encoded(noise(64, 64))
  images = [{'bytes': x, 'path': 'a/b.png'} for x in (image, None)]
  table = pa.table({'jpg': images, 'label': [None, 3], 'text': ['a', 'b']})
  pq.write_table(table, path, row_group_size=1, compression=compression)
  source = open_images(f'parquet:{path}')['all']
  assert source[0] == (image, -1, 'x/0') and source.labels[1] == 3
  assert source[1].image == b''  # and so left out
  content = path.read_bytes()
  path.write_bytes(content[:4] + b'?' * 20 + content[24:])
  with one_line('x.parquet changed in use'):
    pickle.loads(pickle.dumps(source))[0]  # noqa: S301, made here
  with one_line('x.parquet is damaged', OSError):
    open_images(f'parquet:{path}')['all'][0]


@pytest.mark.parametrize('kind', ['wds', 'parquet'])
@pytest.mark.parametrize(
  'name, message',
  [
    ('https://x.org/a-{0..9}', 'expected local files, .*download them first'),
    ('pipe:curl x', 'expected local files, got pipe:curl x; download'),
    ('/nowhere/{0..9}', 'there is no /nowhere/0'),
    ('', 'expected data set folder:PATH'),
    ('.', 'holds no .(tar|parquet) files'),
  ],
)
def test_a_bad_pattern_is_one_line(tmp_path, monkeypatch, kind, name, message):
  monkeypatch.chdir(tmp_path)
  with one_line(message):
    open_dataset(f'{kind}:{name}')


def test_the_hub_is_asked_for_and_its_faults_are_one_line(
  tmp_path, write, hub, monkeypatch
):
  write('hf', {'train': Numbered(range(9)), 'other': Numbered(range(9))})
  assert [*open_images('hf:me/set/small@v1')] == ['train']
  assert hub.asked == ('small', 'v1')
  assert [*open_images(f'hf:{tmp_path}')] == ['all']
  with one_line('cannot open hf:me/no: no such set', OSError):
    open_images('hf:me/no')
  del hub.splits['train']
  with one_line('hf:me/set: expected .* train, validation, test, got .* other'):
    open_images('hf:me/set')
  hub.__version__ = '3.6.0'
  with one_line("pip install 'datasets>=4' .older versions", ImportError):
    open_images('hf:me/set')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with one_line("extra hf: pip install 'datasets>=4'", ImportError):
    open_images('hf:me/set')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['wds', 'parquet'])
def test_programs_see_the_images_of_the_folder(
  image_folder, image_shards, tiny_run, tmp_path, kind
):
  results, tokenizer = [], load(tiny_run)
  for i, name in enumerate((str(image_folder), image_shards(kind))):
    encode_dataset(tokenizer, open_images(name)['test'], tmp_path / f'{i}')
    ids, labels = (
      np.load(tmp_path / f'{i}/{x}.npy') for x in ('ids', 'labels')
    )
    shown = page.example_images(tokenizer, 5, source=name)
    measured = evaluate_run(tiny_run, images=name, output=tmp_path / f'out{i}')
    results.append((ids, labels, [x for _, x in shown], measured['mse']))
  for one, two in zip(*results, strict=True):
    np.testing.assert_array_equal(one, two)
  names = (tmp_path / '1/names.txt').read_text().split()
  assert names[1] == {'wds': '00000001', 'parquet': 'test-00000/1'}[kind]


def test_a_run_keeps_the_absolute_pattern_and_tells_it_to_nobody(
  tmp_path, write, tiny_config, monkeypatch
):
  name = write('wds', {'train': Numbered(range(9)), 'test': Numbered(range(3))})
  monkeypatch.chdir(tmp_path)
  tiny_config.data.name = 'wds:set/wds/*.tar'
  flat = check_config(tiny_config)
  assert flat['data.name'] == f'{name}/*.tar'
  assert shared_config(flat)['data.name'] == 'wds:*.tar'
  RunData(flat).open_dataset(None).write_split(tmp_path / 'split.json')
  (tmp_path / 'set').rename(tmp_path / 'moved')
  with one_line('there is no .*; name the present .*--data_dir=.*=wds:FOLDER'):
    RunData(flat).open_dataset(tmp_path / 'split.json')
  moved = str(tmp_path / 'moved/wds')
  data = RunData(flat).open_dataset(tmp_path / 'split.json', data_dir=moved)
  assert len(data.train) == 9
