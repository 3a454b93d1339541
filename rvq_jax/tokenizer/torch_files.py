"""The tensors of weights files, read as data: nothing in a file runs.

A pickle is a program. `pickletools` lists its instructions; here they make
dicts, lists (also for tuples, whose recursive hash could end the process),
numbers and views of storages, and None for everything else. This looks up no
class or function.
"""

import functools
import io
import pickletools
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file before PyTorch 1.6
# NumPy's names, and those of PyTorch's storages and of safetensors' dtypes.
_NAMES = """float64 DoubleStorage F64  float32 FloatStorage F32
float16 HalfStorage F16  bfloat16 BFloat16Storage BF16  int64 LongStorage I64
int32 IntStorage I32  int16 ShortStorage I16  int8 CharStorage I8
uint8 ByteStorage U8  bool BoolStorage BOOL
complex64 ComplexFloatStorage C64""".split()
_DTYPES = dict(zip(_NAMES[1::3], map(np.dtype, _NAMES[::3]), strict=True))
_DTYPES |= dict(zip(_NAMES[2::3], _DTYPES.values(), strict=True))
# Allowed names in a pickle: the first part of a module, or a builtin type.
_MODULES = """torch torchvision torchmetrics pytorch_lightning lightning
lightning_fabric lightning_utilities numpy omegaconf collections argparse typing
pathlib datetime enum copyreg _codecs easydict yacs ml_collections taming ldm
main __main__ models modules utils src""".split()
_TYPES = """set frozenset dict list tuple str unicode bytes bytearray int long
float complex bool slice range object""".split()


class _Other(ValueError):
  """Describes what a file seems to be instead."""


class _Tensor(list):
  """The key of a storage, offset, sizes and strides, in elements."""


def read_tensors(path) -> dict[str, np.ndarray]:
  """Reads a weights file without PyTorch and without running anything.

  Args:
    path: a .safetensors file, or one of torch.save, of today or before 1.6
      (.ckpt, .pt, .pth, .bin). The content decides, not the suffix.

  Returns:
    Every dense tensor in nested dicts, by its keys joined with dots, such as
    'state_dict.encoder.conv_in.weight'. bfloat16 becomes float32, without loss;
    other dtypes stay. Arrays are C-contiguous; most are read-only views.

  Raises:
    ValueError: the file is missing, damaged, holds no such tensors, or its
      pickle has a name that weights do not need, such as os.system.
  """
  try:
    arrays, room = _read(Path(path)), 4 * Path(path).stat().st_size + 2**20
    if not arrays:
      raise _Other('a file without named tensors: save a state_dict')
    for name, x in arrays.items():
      dtype = np.dtype('f4') if x.dtype == ml_dtypes.bfloat16 else x.dtype
      if dtype != x.dtype or not x.flags.c_contiguous:
        room -= x.size * dtype.itemsize
        if room < 0:
          raise _Other('tensors far larger than their file')
        arrays[name] = x.astype(dtype, order='C')
    return arrays
  except Exception as error:  # a damaged pickle may raise nearly any type
    what = f'a damaged or missing file ({type(error).__name__}: {error})'
    what = str(error) if isinstance(error, _Other) else what
    raise ValueError(
      f'{path}: expected the weights of a network, got '
      + re.sub('[^ -~]+', ' ', what[:300])  # text from the file
    ) from error


def _read(path):
  """The arrays of a file; its content decides how to read it."""
  with open(path, 'rb') as stream:
    head = stream.read(512)
  if not head:
    raise _Other('an empty file')
  if head.startswith(b'version https://git-lfs'):
    raise _Other('a Git LFS pointer: fetch the file itself by git lfs pull')
  if head.startswith(b'PK'):
    return _read_zip(path)
  if (head.isascii() and b'\0' not in head) or head.lstrip()[:1] == b'<':
    raise _Other(f'a text or web page that begins with {head[:40]!r}')
  if path.suffix == '.safetensors' or head[7:9] == b'\0{':
    tensors = sorted(safetensors.deserialize(path.read_bytes()))
    return {
      name: np.ndarray(x['shape'], _DTYPES[x['dtype']], x['data'])
      for name, x in tensors
    }
  if head.startswith(b'\x80'):
    return _read_legacy(path)
  raise _Other(f'a file that begins with {head[:16]!r}')


def _read_zip(path):
  """Reads torch.save's format: data.pkl, and data/KEY per storage."""
  with zipfile.ZipFile(path) as archive:
    names, dtypes = archive.namelist(), {}
    if sum(x.file_size for x in archive.infolist()) > path.stat().st_size:
      raise _Other('a compressed zip archive: torch.save does not compress')
    if any(x.endswith('/constants.pkl') for x in names):
      raise _Other('a TorchScript archive: save its state_dict by torch.save')
    prefix = next((x[:-8] for x in names if x.endswith('/data.pkl')), None)
    if prefix is None:
      raise _Other(f'a zip archive of {names[:1]}, not from torch.save')
    order = f'{prefix}byteorder'
    if order in names and archive.read(order) != b'little':
      raise _Other('tensors from a big-endian machine')

    @functools.cache
    def storage(key):
      return np.frombuffer(archive.read(f'{prefix}data/{key}'), dtypes[key])

    stream = io.BytesIO(archive.read(f'{prefix}data.pkl'))
    return _arrays(_unpickle(stream, dtypes), storage)


def _read_legacy(path):
  """Reads torch.save's format before 1.6: five pickles, then the storages."""
  data, dtypes, storages = path.read_bytes(), {}, {}
  stream = io.BytesIO(data)
  if _unpickle(stream, dtypes) != _MAGIC:
    raise _Other('a pickle that torch.save did not write')
  _, _, tree, keys = (_unpickle(stream, dtypes) for _ in range(4))
  for key in keys:
    count = int.from_bytes(stream.read(8), 'little')
    storages[key] = np.frombuffer(data, dtypes[key], count, stream.tell())
    stream.seek(storages[key].nbytes, io.SEEK_CUR)
  return _arrays(tree, storages.get)


def _unpickle(stream, dtypes):
  """The value of one pickle; fills `dtypes` with storages' dtypes by key."""
  stack, marks, memo, mark = [], [], {}, pickletools.markobject
  for op, arg, _ in pickletools.genops(stream):
    needs = op.stack_before
    start = len(stack) - len(needs)
    if mark in needs:
      start = marks.pop() - needs.index(mark)
    given, stack[start:] = stack[start:], []
    match op.name:
      case 'STOP':
        return given[0]
      case 'MARK':
        marks.append(start)
      case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
        memo[arg] = stack[-1]
      case 'GET' | 'BINGET' | 'LONG_BINGET':
        stack.append(memo[arg])
      case 'MEMOIZE':
        memo[len(memo)] = given[0]
        stack += given
      case 'EMPTY_DICT':
        stack.append({})
      case name if 'TUPLE' in name or name == 'EMPTY_LIST':
        stack.append(given)
      case 'APPEND' | 'APPENDS' | 'SETITEM' | 'SETITEMS' | 'BUILD':
        stack.append(_fill(*given))
      case 'GLOBAL' | 'INST' | 'STACK_GLOBAL':
        stack.append(_global('.'.join(arg.split(' ', 1) if arg else given)))
      case 'REDUCE':
        stack.append(_call(*given))
      case 'BINPERSID':
        _, kind, key, *rest = given[0]
        kind = kind.rpartition('.')[2]
        if kind not in _DTYPES or any(rest[2:]):
          raise _Other(f'an unknown storage, or a part of one: {kind}')
        dtypes[key] = _DTYPES[kind]
        stack.append(key)
      case _ if op.stack_after:
        stack.append(arg)


def _fill(target, *items):
  """Puts items into a list or a dict; drops them for anything else."""
  if type(target) is list:
    target += items
  elif isinstance(target, dict):
    for key, value in zip(items[::2], items[1::2], strict=False):
      if isinstance(key, str | int):
        target[key] = value
  return target


def _global(name):
  """The name of a class or function; refuses names that weights do not need."""
  root, _, rest = name.partition('.')
  is_type = root in ('builtins', '__builtin__') and rest in _TYPES
  if root not in _MODULES and not is_type:
    raise _Other(
      f'a pickle that names {name[:80]}; nothing was run; save only a '
      'state_dict'
    )
  return name


def _call(function, args):
  """The result of a call: a dict or a tensor, else None."""
  match isinstance(function, str) and function.removeprefix('torch._utils.'):
    case 'collections.OrderedDict' | 'collections.defaultdict':
      return {}
    case '_rebuild_tensor_v2' | '_rebuild_tensor':
      return _Tensor(args[:4])
    case '_rebuild_parameter' | '_rebuild_parameter_with_state':
      return args[0]


def _arrays(tree, storage):
  """The arrays of nested dicts; `storage` gives a flat array by its key."""
  todo, arrays = [('', tree)], {}
  for prefix, value in todo:  # grows
    if isinstance(value, _Tensor):
      arrays[prefix] = _view(storage(value[0]), *value[1:])
    elif isinstance(value, dict):
      for key, child in value.items():
        if isinstance(child, dict | _Tensor):
          name = f'{prefix}.{key}' if prefix else str(key)
          if len(name) > 1000 or len(todo) > 10**5:
            raise _Other('dicts nested without end')
          todo.append((name, child))
  return arrays


def _view(flat, offset, size, stride):
  """The array of a tensor; ValueError unless it lies within its storage."""
  if any(
    type(n) is not int or not 0 <= n < 2**60 for n in [offset, *size, *stride]
  ):
    raise ValueError('sizes, strides or offset of a tensor')
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if 0 not in size and last >= len(flat):
    raise ValueError(f'a tensor of {size} ends beyond its storage')
  strides = [flat.itemsize * s for s in stride]
  return np.lib.stride_tricks.as_strided(
    flat[offset:], size, strides, writeable=False
  )
