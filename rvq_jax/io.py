"""Atomic writes, file locks, array digests, readable disk-full errors."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

HUB, PRETRAINED = 'hf:', 'pretrained:'
SHARED = (HUB, PRETRAINED)  # prefixes of models that are not folders
_FULL = {
  errno.ENOSPC: 'No space left',
  errno.EDQUOT: 'Disk quota exceeded',
  errno.EFBIG: 'File too large',
}


def write_atomic(path, content: str | bytes) -> None:
  """Writes text (UTF-8) or bytes: the file holds the old or the new content.

  An OSError leaves no temporary file.
  """
  path = Path(path)
  data = content.encode() if isinstance(content, str) else content
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with open(partial, 'wb') as stream:
      stream.write(data)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(partial, path)
  except OSError as error:
    # Name the file that the user knows.
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def check_local(path, name: str = 'output') -> Path:
  """The path of a local folder or file; a ValueError for a URL says `name`."""
  if re.match(r'[a-z][a-z0-9+.-]+:/', str(path), re.I):
    raise ValueError(
      f'{name}: expected a local path, got {path}; copy it to a local folder, '
      'or mount it as one'
    )
  return Path(path)


def cache_folder(name: str) -> Path:
  """A folder of the cache; relative if the user has no home directory."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return Path(home, 'rvq_jax', name)


def utf8_path(workdir) -> Path:
  """The full path of a workdir; ValueError unless TensorStore accepts it."""
  path = Path(workdir).resolve()
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'--workdir: expected a path in UTF-8, got {path}; rename its folder, or '
      'name another one'
    ) from error
  return path


def check_folder(
  folder,
  name: str = 'output',
  is_ours: Callable[[Path], bool] | None = None,
  rest: str = '',
) -> None:
  """Checks, before a command works, that it may write to a folder.

  `rest` is a pattern for the names of a killed command's remains: a folder with
  only these counts as empty.

  Raises:
    ValueError: says `name`; unless the folder is missing, empty or, by
      `is_ours`, the command's own; or if it is not writable.
  """
  folder = check_local(folder, name)
  if folder.exists() and (
    not folder.is_dir()
    or any(not fnmatch.fnmatchcase(x.name, rest) for x in folder.iterdir())
  ):
    if not (is_ours and folder.is_dir() and is_ours(folder)):
      raise ValueError(
        f'{name}: expected a new or empty folder'
        f'{", or one that this command wrote" if is_ours else ""}, got '
        f'{folder}; name another one'
      )
  _check_writable(folder, folder, name)


def check_file(path, name: str = 'output') -> None:
  """Raises ValueError unless a file's folder is writable."""
  path = check_local(path, name)
  if not path.parent.is_dir():
    raise ValueError(
      f'{name}: cannot write {path}: there is no folder {path.parent}'
    )
  _check_writable(path.parent, path, name)


def _check_writable(folder, path, name):
  """Makes a nameless file in a folder, or in its nearest existing parent."""
  folder = folder.absolute()
  where = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
  try:
    with tempfile.TemporaryFile(dir=where):
      pass
  except OSError as error:
    if error.errno not in _FULL:
      raise ValueError(
        f'{name}: cannot write to {path}: {error.strerror}; name another one'
      ) from error


@contextlib.contextmanager
def claim(
  folder,
  advice: str,
  is_ours: Callable[[Path], bool] | None = None,
  rest: str = '',
) -> Iterator[None]:
  """Makes a folder and holds its lock while a command fills it.

  Removes a folder that was new and stayed empty. Arguments and errors as in
  `check_folder`, `lock` and `explain_full_disk`.
  """
  folder = Path(folder)
  check_folder(folder, is_ours=is_ours, rest=rest)
  new = not folder.exists()
  with explain_full_disk(folder, advice):
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, folder, 'name another one'):
      # Another process may have filled it before the lock.
      check_folder(folder, is_ours=is_ours, rest=rest)
      try:
        for path in folder.glob(rest) if rest else ():
          shutil.rmtree(path)
        yield
      finally:
        with contextlib.suppress(OSError):  # not empty
          if new:
            folder.rmdir()


@contextlib.contextmanager
def lock(path, name, advice: str) -> Iterator[None]:
  """Holds a lock that the OS releases however the process ends.

  Args:
    path: a folder, or a file; creates a missing file and its folder.
    name, advice: the locked thing and the user's alternative, for errors.

  Raises:
    ValueError: another process holds the lock, or the folder cannot be made.
  """
  path = Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'cannot make the folder {path.parent}: {error.strerror}; {advice}'
    ) from error
  flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
  descriptor = os.open(path, flags, 0o666)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'{name} is in use by another process; wait for it, stop it, or '
        f'{advice}'
      ) from error
    except OSError as error:  # some network file systems have no locks
      logging.warning('%s cannot be locked: %s', name, error.strerror)
    yield
  finally:
    os.close(descriptor)


def read_json(path, max_bytes: int = 2**20) -> dict[str, Any] | None:
  """The JSON object in an untrusted file.

  None if the file is longer than max_bytes, not JSON, or not an object.
  """
  with open(path, 'rb') as stream:
    text = stream.read(max_bytes + 1)
  if len(text) > max_bytes:
    return None
  with contextlib.suppress(ValueError, RecursionError):
    content = json.loads(text)
    return content if isinstance(content, dict) else None
  return None


def tree_digest(tree, *, header: str = '') -> str:
  """SHA-256 over path, dtype, shape and bytes of every array of a tree.

  Args:
    tree: arrays; each process must hold a full copy of each.
    header: text that is hashed first.

  Returns:
    64 hexadecimal digits, independent of the order of the leaves.
  """
  digest = hashlib.sha256(header.encode())
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  for name, leaf in sorted(leaves.items()):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      leaf = leaf.addressable_data(0)
    array = np.asarray(leaf)
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def full_disk_reason(error: BaseException | None) -> str | None:
  """The text in _FULL if a full disk caused an error, else None.

  TensorStore names the cause in the text of a ValueError, Orbax chains it.
  """
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _FULL:
      return _FULL[error.errno]
    for text in _FULL.values():
      if text.lower() in str(error).lower():
        return text
    error = error.__cause__ or error.__context__
  return None


class FullDiskError(OSError):
  """A write without room, in one line."""


@contextlib.contextmanager
def explain_full_disk(folder, advice: str) -> Iterator[None]:
  """Turns a write without room into a one-line `FullDiskError`.

  It names the folder, its free space and the `advice`.
  """
  try:
    yield
  except FullDiskError:  # already names a folder
    raise
  except (Exception, SystemExit) as error:
    reason = full_disk_reason(error)
    if reason is None:
      raise
    path = Path(folder).resolve()
    where = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(where).free / 1e6
    raise FullDiskError(
      f'{reason} while writing to {folder}, where {free:,.1f} MB are free; '
      f'make room and {advice}'
    ) from error
