"""Tars, Parquet and `datasets`: records, order, splits, faults in one line."""

import gzip
import io
import json
import logging
import lzma
import pickle
import subprocess
import tarfile
import tempfile

import numpy as np
import pytest
from errors import one_line
from PIL import Image
from tiny_data import encoded, ids, numbered

from rvq_jax.data import tars
from rvq_jax.data.datasets import open_dataset, open_images

SIZES = {'batch_size': 4, 'image_size': 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache/rvq_jax/tars'


def png(i):
  return encoded(numbered(i))


def tar(path, members, form=tarfile.PAX_FORMAT):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=form) as archive:
    for name, data in members.items():
      member = tarfile.TarInfo(name)
      member.size, member.mtime = len(data), 1.5  # a PAX header, if it may be
      archive.addfile(member, io.BytesIO(data))


def example(i):
  return {f'{i:04d}.png': png(i), f'{i:04d}.cls': b'%d\n' % (i % 3)}


def fill_tars(root, counts=(12, 8, 10), bad=()):
  """train-000000.tar, train-000001.tar, val-000000.tar."""
  names, start = ('train-000000', 'train-000001', 'val-000000'), 0
  for name, count in zip(names, counts, strict=True):
    rows = range(start, start + count)
    members = [example(i) for i in rows]
    members = {n: d for x in members for n, d in x.items()}
    members |= {f'{i:04d}.png': b'no image' for i in bad if i in rows}
    tar(root / f'toy-{name}.tar', members)
    start += count
  return f'wds:{root}'


def test_tars_come_back_as_they_were_written_and_pickled(tmp_path):
  data = open_dataset(fill_tars(tmp_path / 'x'))
  for source, rows in ((data.train, range(20)), (data.test, range(20, 30))):
    for i, record in zip(rows, source, strict=True):
      assert record == (png(i), i % 3, f'{i:04d}')
    assert source.labels.tolist() == [i % 3 for i in rows]
    assert source.labels.dtype == np.int32
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
    assert list(copy) == list(source)
    assert [*copy.identity()] == [*source.identity()]
  assert data.names['train'][3] == 'train/0003'
  assert 'validation and test are both' in data.note
  # In a process of its own no descriptor comes along.
  assert b'descriptor' not in pickle.dumps(data.train)


FORMS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]


@pytest.mark.parametrize('form', FORMS)
def test_members_of_one_stem_are_one_example_whatever_the_format(
  tmp_path, form, caplog
):
  long = 'deep/' * 20 + 'n' * 90
  long += '' if form == tarfile.USTAR_FORMAT else 'm' * 200
  members = {
    './a.b/0001.json': json.dumps({'label': 7, 'url': 'x'}).encode(),
    './a.b/0001.JPG': png(1),
    './a.b/0001.txt': b'a caption',
    './a.b/0001.seg.png': b'not the image',
    f'{long}.png': png(2),
    '0003.json': b'{"label": "cat"}',
    '0003.png': png(3),
    '0004.cls': b'5',
    '0004.png': png(4),
    '0005.txt': b'no image at all',
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
  expected = [
    ('a.b/0001', 7, 1),
    (long, -1, 2),
    ('0003', -1, 3),
    ('0004', 5, 4),
  ]
  assert [(x.name, x.label) for x in source] == [x[:2] for x in expected]
  assert [x.image for x in source] == [png(x[-1]) for x in expected]
  assert 'left out 1 examples that have no image' in caplog.text


def test_an_index_is_built_once_and_for_changed_tars_anew(
  tmp_path, cache, caplog
):
  name = fill_tars(tmp_path / 'x')
  with caplog.at_level(logging.INFO):
    open_images(name)
    [_], [inside] = (tmp_path / 'x').glob('.*'), cache.iterdir()
    first = open_images(name)
    inside.unlink()
    open_images(name)  # from the file beside the tars
    assert caplog.text.count('indexing 3 tars, once') == 1
    tar(tmp_path / 'x/toy-val-000000.tar', example(20) | example(21))
    assert len(open_images(name)['validation']) == 2
    assert caplog.text.count('indexing 3 tars, once') == 2
  with one_line('toy-val-000000.tar changed in use; give the same'):
    first['validation'][0]
  with one_line('the tars changed in use'):
    pickle.loads(pickle.dumps(first['train']))  # noqa: S301, made here
  assert len([*(tmp_path / 'x').glob('.*')]) == 1


@pytest.mark.parametrize('state', ['cut', 'foreign', 'closed'])
def test_a_damaged_foreign_or_forbidden_index_is_no_trouble(
  tmp_path, cache, monkeypatch, state
):
  name = fill_tars(tmp_path / 'x')
  open_images(name)
  [beside] = (tmp_path / 'x').glob('.rvq*')
  [inside] = cache.iterdir()
  whole = beside.read_bytes()
  text = whole[: len(whole) // 2] if state == 'cut' else b'mine'
  for path in (beside, inside):
    path.unlink() if state == 'closed' else path.write_bytes(text)
  if state == 'closed':
    monkeypatch.setattr(tars, 'write_atomic', _refuse)
  source = open_images(name)['train']
  assert len(source) == 20 and source[19].image == png(19)
  copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here
  assert list(copy) == list(source)
  left = {'cut': [whole], 'foreign': [b'mine'], 'closed': []}[state]
  assert [x.read_bytes() for x in (tmp_path / 'x').glob('.rvq*')] == left


def _refuse(path, content):
  raise PermissionError(13, 'Permission denied', str(path))


BOTH, FIRST = {'train': [0], 'validation': [1]}, {'all': [0, 1, 2]}


def fill(root, *names):
  """Tars of one image each, by name."""
  for i, name in enumerate(names):
    tar(root / name, example(i))


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
)  # fmt: skip
def test_files_and_splits_of_a_pattern(tmp_path, names, pattern, splits):
  fill(tmp_path, *names)
  found = open_images(f'wds:{tmp_path}/{pattern}')
  found = {s: [ids(decoded(x))[0] for x in found[s]] for s in found}
  assert found == splits


def decoded(record):
  return np.asarray(Image.open(io.BytesIO(record.image)))[None]


def sparse(_):
  with tempfile.TemporaryDirectory() as folder:
    with open(f'{folder}/hole.png', 'wb') as stream:
      stream.seek(10**6)
      stream.write(b'x')
    pack = ['tar', '-Scf', '-', '-C', folder, 'hole.png']
    return subprocess.run(pack, check=True, capture_output=True).stdout


def data_end(data):
  return -(-len(data.rstrip(b'\0')) // 512) * 512


TAR_FAULTS = [
  ('cut short .* .unexpected end', lambda x: x[:560]),
  ('cut short .* .no end', lambda x: x[: data_end(x)]),
  ('cut short .* .empty', lambda x: b''),
  ('cut short .* .data after', lambda x: x[:1030] + b'?' + x[1031:]),
  ('damaged .invalid header', lambda x: b'no tar' * 999),
  ('damaged .data after its end.*put back', lambda x: x + x),
  ("is compressed; unpack it: gzip -d '.*a b.tar'", gzip.compress),
  ('is compressed; unpack it: xz -d ', lzma.compress),
  ('a b.tar holds no images; expected', {'1.txt': b'', '1.cls': b'1'}),
  ('a b.tar holds no images', {}),
  ('two images .*: 1.png and .jpg', {'1.jpg': b'', '1.png': b''}),
  ('a b.tar and .*c.tar both hold 0003: expected diff', None),
  ("a sparse file, hole.png; unpack it: tar -xf '", sparse),
]


@pytest.mark.parametrize('message, change', TAR_FAULTS)
def test_a_bad_tar_is_one_line(tmp_path, message, change):
  path = tmp_path / 'a b.tar'
  tar(path, example(3), tarfile.USTAR_FORMAT)
  if isinstance(change, dict):
    tar(path, change)
  elif change:
    path.write_bytes(change(path.read_bytes()))
  else:
    tar(tmp_path / 'c.tar', example(3))
  with one_line(message):
    open_images(f'wds:{tmp_path}')
  assert not [*tmp_path.glob('.rvq*')]


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
