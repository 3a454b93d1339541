"""Weights files of PyTorch, written here by hand, and by PyTorch."""

import io
import os
import pickle
import random
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from errors import one_line
from safetensors.numpy import save

from rvq_jax.tokenizer.torch_files import read_tensors

W = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
STORAGES = {  # by key: the type, and what it holds
  '0': ('FloatStorage', W),
  '1': ('HalfStorage', W.astype(np.float16)),
  '2': ('BFloat16Storage', W.astype(ml_dtypes.bfloat16)),
  '3': ('LongStorage', np.array([-(2**40), 3])),
  '4': ('BoolStorage', W > 1),
  '5': ('FloatStorage', W[:0]),
}


class Name(str):
  """A class or function."""


class Op(NamedTuple):
  args: tuple[Any, ...]
  op: bytes = b'R'  # a call; \x81 makes an object, b fills one, Q a storage


def code(x) -> bytes:
  """The instructions that make a value, in protocol 2."""
  match x:
    case Name():
      return b'c' + '\n'.join(x.rsplit('.', 1)).encode() + b'\n'
    case Op():
      return b''.join(map(code, x.args)) + x.op
    case dict():
      return b'}(' + b''.join(code(k) + code(v) for k, v in x.items()) + b'u'
    case tuple() | list():
      start, end = (b'](', b'e') if isinstance(x, list) else (b'(', b't')
      return start + b''.join(map(code, x)) + end
  return x if isinstance(x, bytes) else pickle.dumps(x, 2)[2:-1]


ORDERED = Op((Name('collections.OrderedDict'), ()))


def tensor(key, size, stride, offset=0, version='_v2', kind=None, view=()):
  kind = Name(f'torch.{kind or STORAGES[key][0]}')
  storage = Op((('storage', kind, key, 'cuda:0', 10**13, *view),), b'Q')
  args = (storage, offset, size, stride, False, ORDERED)
  return Op((Name(f'torch._utils._rebuild_tensor{version}'), args))


def pack(files, method=zipfile.ZIP_STORED) -> bytes:
  """A zip archive."""
  with zipfile.ZipFile(stream := io.BytesIO(), 'w', method) as archive:
    for name, data in files.items():
      archive.writestr(name, data)
  return stream.getvalue()


def saved(tree, legacy=False, **members) -> bytes:
  """What torch.save writes, or wrote before 1.6."""
  program = b'\x80\x02' + code(tree) + b'.'
  if legacy:
    heads = 0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}
    content = b''.join(pickle.dumps(x, 2) for x in heads)
    content += program + pickle.dumps([*STORAGES], 2)
    for _, held in STORAGES.values():
      content += held.size.to_bytes(8, 'little') + held.tobytes()
    return content
  files = {f'data/{key}': x.tobytes() for key, (_, x) in STORAGES.items()}
  files = {'data.pkl': program, 'byteorder': b'little', **files, **members}
  return pack({f'last/{name}': data for name, data in files.items()})


DENSE = tensor('0', (3, 4), (4, 1))
PARAMETER = Name('torch._utils._rebuild_parameter')
NETWORK = {  # by name: how it is saved, and what comes back
  'w': (Op((PARAMETER, (DENSE, True, ORDERED))), W),
  'turned': (tensor('0', (4, 3), (1, 4)), W.T),
  'part': (tensor('0', (2, 2), (4, 2), 5, ''), W.ravel()[[[5, 7], [9, 11]]]),
  'half': (tensor('1', (3, 4), (4, 1)), STORAGES['1'][1]),
  'brain': (tensor('2', (3, 4), (4, 1)), STORAGES['2'][1].astype(np.float32)),
  'count': (tensor('3', (), (), 1), np.array(3)),
  'mask': (tensor('4', (3, 4), (4, 1)), W > 1),
  'none': (tensor('5', (3, 0), (1, 1)), W[:, :0]),
}
SAVED = {name: x for name, (x, _) in NETWORK.items()}
OTHER = {
  'callbacks': {Name('pytorch_lightning.callbacks.Model'): {'best': 1.5}},
  'hyper_parameters': Op(
    (Op((Name('omegaconf.DictConfig'), ()), b'\x81'), {'lr': 1}), b'b'
  ),
  'args': Op((Op((Name('argparse.Namespace'), ())), {'epochs': 3}), b'b'),
  'optimizer_states': [{'state': DENSE}],
  'loss': Op((Name('numpy.core.multiarray.scalar'), ('f8', 'bytes'))),
  'classes': Op((Name('__builtin__.set'), (['cat'],))),
  b'K\x00' + b'\x85' * 10**5: 'a key whose hash would end the process',
}


@pytest.mark.parametrize('legacy', [False, True])
def test_tensors_come_by_name_without_what_lies_beside_them(legacy, tmp_path):
  # As a module's state_dict: filled after the call, and with an attribute.
  ordered = Op((code(ORDERED) + code(SAVED)[1:], {'_metadata': ORDERED}), b'b')
  tree = {**OTHER, 'state_dict': ordered, 'ema': {0: {'w': DENSE}}}
  path = tmp_path / 'last.ckpt'
  path.write_bytes(saved(tree, legacy))
  got = read_tensors(path)
  assert np.shares_memory(got.pop('ema.0.w'), got['state_dict.w'])
  assert got.keys() == {f'state_dict.{name}' for name in NETWORK}
  for name, (_, x) in NETWORK.items():
    assert got[f'state_dict.{name}'].flags.c_contiguous, name
    np.testing.assert_array_equal(got[f'state_dict.{name}'], x, strict=True)


def test_safetensors_come_as_they_are_but_bfloat16_as_float32(tmp_path):
  arrays = {name: STORAGES[key][1] for name, key in ('a0', 'b1', 'c2')}
  for name in ('model.safetensors', 'pytorch_model.bin'):
    (tmp_path / name).write_bytes(save(arrays))
    got = read_tensors(tmp_path / name)
    assert got.keys() == arrays.keys()
    assert [x.dtype for x in got.values()] == ['float32', 'float16', 'float32']
    for key, x in arrays.items():
      np.testing.assert_array_equal(got[key], x.astype(got[key].dtype))


class Bomb:
  def __reduce__(self):
    return os.mkdir, ('executed',)


def bad(*args, **changed):
  return saved({'w': tensor(*args, **changed)})


def evil(name, legacy=False):
  return saved([DENSE, Op((Name(name), ('executed',)))], legacy)


GOOD, OLD = saved(SAVED), saved(SAVED, legacy=True)
CYCLE = b'}q\x01(X\x01\0\0\0ah\x01u'
TWICE = b'}q\x01' + b'}(X\x01\0\0\0ah\x01X\x01\0\0\0bh\x01uq\x01' * 60
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
BAD = {
  'missing': (None, 'missing .*FileNotFoundError'),
  'empty': (b'', 'an empty file'),
  'pointer': (LFS, 'a Git LFS pointer: fetch'),
  'page': (
    '<!doctype html>é'.encode(),
    'a .*page that begins with .*<!doctype',
  ),
  'text': (b'{"error": "gone"}', 'a text .*begins with .*gone'),
  'png': (b'\x89PNG\r\n\x1a\n\0', 'a file that begins with .*PNG'),
  'cut': (GOOD[:-40], 'damaged .*zip'),
  'flip': (GOOD.replace(W[1].tobytes(), W[2].tobytes()), 'damaged .*CRC'),
  'old cut': (OLD[:-9], 'damaged .*buffer is smaller'),
  'keras': (pack({'config.json': '{}'}), r"zip archive of \['config.json'\]"),
  'script': (saved(SAVED, **{'constants.pkl': b''}), 'a TorchScript archive'),
  'order': (saved(SAVED, byteorder=b'big'), 'big-endian'),
  'zeros': (
    pack({'a': bytes(10**6)}, zipfile.ZIP_DEFLATED),
    'a compressed zip',
  ),
  'safetensors': (save({'w': W})[:-1], 'damaged .*SafetensorError'),
  'os': (evil('os.system'), 'a pickle that names os.system; nothing was run'),
  'old os': (evil('os.system', legacy=True), 'names os.system'),
  'getattr': (evil('__builtin__.getattr'), 'names __builtin__.getattr'),
  'inst': (saved(b'(ios\nsystem\n'), 'names os.system'),
  'bomb': (pickle.dumps(Bomb()), 'names posix.mkdir'),
  'bare': (pickle.dumps([1]), 'a pickle that torch.save did not write'),
  'void': (save({}), 'without named tensors'),
  'list': (saved([DENSE]), 'without named tensors'),
  'module': (saved(Op((Name('models.Net'), ()), b'\x81')), 'without named'),
  'long': (bad('0', (13,), (1,)), r'\[13\] ends beyond its storage'),
  'offset': (bad('0', (3, 4), (4, 1), 1), 'beyond its storage'),
  'before': (bad('0', (2,), (1,), -1), 'sizes, strides or offset'),
  'wraps': (bad('0', (2**32 + 1,), (2**32,)), 'beyond its storage'),
  'huge': (bad('0', (2**40,), (0,)), 'far larger than their file'),
  'float8': (
    bad('0', (1,), (1,), kind='UntypedStorage'),
    'storage, .*: UntypedSto',
  ),
  'ancient': (bad('0', (1,), (1,), view=[('1', 1, 1)]), 'a part of one'),
  'cycle': (saved(CYCLE), 'dicts nested without end'),
  'twice': (saved(TWICE), 'dicts nested without end'),
  'memo': (saved(b'Nr\xff\xff\xff\x7fj\xfe\xff\xff\x7f'), 'KeyError'),
  'claim': (saved(b'B\xff\xff\xff\xffa'), 'damaged.*4294967295 bytes'),
}


@pytest.mark.parametrize('name', BAD)
def test_other_content_is_refused_in_one_line(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (content, message), path = BAD[name], tmp_path / 'last.ckpt'
  if content is not None:
    path.write_bytes(content)
  with one_line(f'^{path}: expected the weights of a network, got .*{message}'):
    read_tensors(path)
  assert {*tmp_path.iterdir()} <= {path}  # nothing was run


@pytest.mark.parametrize('content', [GOOD, OLD], ids=['zip', 'legacy'])
def test_any_damage_is_found_or_leaves_tensors(content, tmp_path):
  rng, path, refused = random.Random(0), tmp_path / 'last.ckpt', 0
  for _ in range(200):
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(damaged[: rng.choice([None, rng.randrange(len(content))])])
    try:
      assert read_tensors(path)
    except ValueError as error:
      assert type(error) is ValueError and '\n' not in str(error)
      refused += 1
  assert refused > 100


@pytest.mark.parametrize('zipped', [True, False])
def test_files_of_pytorch_hold_what_pytorch_reads(zipped, tmp_path):
  torch = pytest.importorskip('torch', reason='no torch: pip install torch')
  x = torch.randn(6, 5)
  layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  tree = {'epoch': 3, 'model': layer.state_dict(), 'parameter': layer[0].weight}
  tree['optimizer'] = torch.optim.Adam(layer.parameters()).state_dict()
  tree |= {'turned': x.T, 'part': x[1::2, 2:], 'half': x.half(), 'tied': x[1:3]}
  tree |= {'brain': x.bfloat16().T, 'ids': torch.arange(3), 'one': x[0, 0]}
  tree |= {'none': x[:0], 'mask': x > 0, 'same': x[:1].expand(4, 5)}
  path = tmp_path / 'last.pt'
  torch.save(
    tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=4
  )
  got = read_tensors(path)
  tree |= {f'model.{name}': x for name, x in tree['model'].items()}
  tree = {name: x for name, x in tree.items() if torch.is_tensor(x)}
  assert got.keys() == tree.keys()
  for name, x in tree.items():
    x = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()
    np.testing.assert_array_equal(got[name], x.numpy(), name, strict=True)
