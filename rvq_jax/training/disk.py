"""Files that are whole or not there, and a full disk in one line."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rvq_jax.training import manifest

_NO_ROOM = {
  errno.ENOSPC: 'No space left',
  errno.EDQUOT: 'Disk quota exceeded',
  errno.EFBIG: 'File too large',
}


def write_whole(path, text: str) -> None:
  """Writes a file that is the old or the new one at every moment.

  Args:
    path: of the file.
    text: its new content.
  """
  path = Path(path)
  partial = path.with_name(f'.{path.name}.partial')
  try:
    with open(partial, 'w') as stream:
      stream.write(text)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(partial, path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def read_object(path, longest: int) -> dict | None:
  """The JSON object that a file holds.

  Args:
    path: of the file.
    longest: bytes; a longer file is not read.

  Returns:
    The object; None where the file is longer, no JSON, or no object.

  Raises:
    OSError: it cannot be read.
  """
  with open(path, 'rb') as stream:
    text = stream.read(longest + 1)
  if len(text) > longest:
    return None
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def no_room(error: BaseException | None) -> str | None:
  """Why there was no room for a file, if that is what an error comes from.

  TensorStore tells it in the text of a ValueError, Orbax by chaining.

  Args:
    error: as caught.

  Returns:
    'No space left', 'Disk quota exceeded', 'File too large', or None.
  """
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
      return _NO_ROOM[error.errno]
    for text in _NO_ROOM.values():
      if text.lower() in str(error).lower():
        return text
    error = error.__cause__ or error.__context__
  return None


def free(path) -> int:
  """Bytes that are free where a path is, or would be."""
  return shutil.disk_usage(_existing(path)).free


def _existing(path) -> Path:
  """The path, or the nearest folder above it that is there."""
  path = Path(path).resolve()
  while not path.exists() and path != path.parent:
    path = path.parent
  return path


def is_full(path) -> bool:
  """Whether less than a megabyte is free where a path is."""
  return free(path) < 2**20


def file_system(path) -> Path:
  """The mount point that a path is on, or would be."""
  path = _existing(path)
  while not os.path.ismount(path):
    path = path.parent
  return path


@contextlib.contextmanager
def room_explained(workdir, state_bytes: int) -> Iterator[None]:
  """Turns a write that found no room into one line.

  Args:
    workdir: directory of the run.
    state_bytes: of the state that a checkpoint holds; one that is there
      already may show that it takes more.

  Raises:
    OSError: names the file system, what is free there and what is needed.
  """
  try:
    yield
  except (Exception, SystemExit) as error:
    reason = no_room(error)
    if reason is None:
      raise
    needed = max(state_bytes, _largest_step(Path(workdir) / 'checkpoints'))
    raise OSError(
      f'{reason} on the file system {file_system(workdir)} while writing to '
      f'{workdir}: {_size(free(workdir))} are free there, and a checkpoint '
      f'takes about {_size(needed)}; make room and start the same command '
      'again, it goes on from the last complete checkpoint'
    ) from error


def _largest_step(directory: Path) -> int:
  """Bytes on disk of the largest checkpoint there is, 0 if there is none."""
  return max(
    (
      sum(
        512 * path.stat().st_blocks
        for path in (directory / str(step)).rglob('*')
      )
      for step in manifest.steps(directory)
    ),
    default=0,
  )


def _size(count: float) -> str:
  """Bytes as people read them: 512 bytes, 3.4 MB."""
  units = ['bytes', 'kB', 'MB', 'GB', 'TB']
  while count >= 1000 and len(units) > 1:
    count /= 1000
    del units[0]
  return f'{count:.{0 if units[0] == "bytes" else 1}f} {units[0]}'
