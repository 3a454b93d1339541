"""One process trains in a workdir at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

NAME = '.lock'
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def _holder(text: str) -> str:
  """Who holds the lock, from what it wrote there."""
  try:
    found = json.loads(text)
    return (
      f'process {found["pid"]} on {found["host"]}, since {found["started"]}'
    )
  except (ValueError, KeyError, TypeError):  # it has only just got it
    return 'another process'


@contextlib.contextmanager
def workdir_lock(workdir) -> Iterator[None]:
  """Holds the lock of a workdir, which the system frees however we end.

  Of the processes of one run only the first takes it.

  The file stays: removing it would let two processes hold two locks of one
  name. Where a file system knows no locks, a warning says so.

  Args:
    workdir: directory of a run; made where there is none.

  Raises:
    ValueError: another process holds it, named with host, process and start;
      or the directory cannot be made.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'cannot make the folder {workdir}: {error.strerror}; give another '
      '--workdir'
    ) from error
  if jax.process_index():
    yield
    return
  path = Path(workdir) / NAME
  # Append mode: what the holder wrote must survive our opening it.
  with open(path, 'a+') as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _TAKEN:
        stream.seek(0)
        raise ValueError(
          f'{workdir} is in use by {_holder(stream.read())}; wait for it, stop '
          'it, or give another --workdir'
        ) from error
      logging.warning(
        '%s cannot be locked (%s); take care that no other process trains '
        'there',
        workdir,
        error.strerror,
      )
    stream.truncate(0)
    now = datetime.datetime.now().astimezone()
    about = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'started': now.isoformat(timespec='seconds'),
    }
    stream.write(json.dumps(about) + '\n')
    stream.flush()
    yield
