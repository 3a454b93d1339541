"""What makes a checkpoint trustworthy: a SHA-256 of each of its files.

Orbax notices neither a flipped byte nor every missing file. So each step holds
a file SHA256SUMS, in the format of `sha256sum`, written before the step gets
its name: a step that is there is complete, has its sums, and is on the disk
and not in a cache. What a killed run was writing still has a temporary name.
"""

import asyncio
import concurrent.futures
import functools
import hashlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

import orbax.checkpoint as ocp

NAME = 'SHA256SUMS'
ASIDE = 'corrupt'
"""Folder beside `checkpoints` that damaged steps are moved to."""

_TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
_LINE = re.compile(r'([0-9a-f]{64})  (\S.*)')
# What not every step has: scores, files named by their content or a process.
_OWN_NAME = re.compile(r'^metrics/|[0-9a-f]{32}$|process_\d')
_THREADS = 4


def _files(step: Path) -> list[str]:
  """The files of a step, relative and sorted; not its sums."""
  found = []
  for folder, _, names in os.walk(step):
    # .nfs*: what a network file system keeps of a file removed while open.
    found += [
      Path(folder, name).relative_to(step).as_posix()
      for name in names
      if not name.startswith('.nfs')
    ]
  return sorted(set(found) - {NAME})


def _sha256(path: Path, *, sync: bool = False) -> str:
  with open(path, 'rb') as stream:
    if sync:
      os.fsync(stream.fileno())
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def _each(function, step: Path, names: list[str]) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(lambda name: function(step / name), names))


def _readable_sum(path: Path) -> str:
  """The sum of a file, or why it cannot be read."""
  try:
    return _sha256(path)
  except OSError as error:
    return f'cannot be read: {error.strerror}'


def _sync_folder(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write(step: Path) -> None:
  """Writes the sums of a step whose files are all there, and syncs them.

  Args:
    step: its directory.
  """
  start = time.monotonic()
  names = _files(step)
  sums = _each(functools.partial(_sha256, sync=True), step, names)
  with open(step / NAME, 'w') as stream:
    stream.writelines(f'{s}  {n}\n' for s, n in zip(sums, names, strict=True))
    stream.flush()
    os.fsync(stream.fileno())
  for folder in {step / name for name in names}:
    _sync_folder(folder.parent)
  _sync_folder(step)
  logging.debug(
    '%s: %d sums in %.3f s', step, len(names), time.monotonic() - start
  )


def _listed(step: Path) -> dict[str, str] | None:
  """Name -> sum as written; None where the list cannot be read."""
  try:
    lines = (step / NAME).read_text('utf-8').splitlines()
  except (OSError, ValueError):
    return None
  matches = [_LINE.fullmatch(line) for line in lines]
  return {m[2]: m[1] for m in matches} if matches and all(matches) else None


def _is_half_deleted(step: Path, intact: Path) -> bool:
  """Whether a step is what Orbax leaves when it is killed while it deletes.

  It removes the files of a step one by one, in no order that one may count on;
  the sums may go first.

  Args:
    step: its directory.
    intact: of another step, in whose sums are the names that every step has.
  """
  there, listed = set(_files(step)), _listed(step)
  if listed is not None:
    return there < listed.keys()
  if os.path.lexists(step / NAME):
    return False  # the sums are damaged, and the rest may be sound
  every = {name for name in _listed(intact) if not _OWN_NAME.search(name)}
  return not every <= there


def fault(step: Path, *, part: str = '') -> str | None:
  """What is wrong with a step.

  Args:
    step: its directory.
    part: only the files whose path begins so are read; of the others only
      the names are compared.

  Returns:
    One line that names the first file at fault, or None for a step that is
    to the bit as it was written.
  """
  there = _files(step)
  if not os.path.lexists(step / NAME):
    return f'{NAME} is missing' if there else 'it is empty'
  listed = _listed(step)
  if listed is None:
    return f'{NAME} is damaged'
  for name in sorted(listed.keys() - set(there)):
    return f'{name} is missing'
  for name in sorted(set(there) - listed.keys()):
    return f'{name} is not in {NAME}'
  names = [name for name in there if name.startswith(part)]
  sums = _each(_readable_sum, step, names)
  for name, found in zip(names, sums, strict=True):
    if found.startswith('cannot'):
      return f'{name} {found}'
    if found != listed[name]:
      size = (step / name).stat().st_size
      return f'{name} ({size} bytes) has another SHA-256 than when it was saved'
  return None


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Orbax's atomic rename of a finished step, with the sums written first.

  Orbax finishes the metadata of a step and renames it in one go. Here it
  renames to a name that is still a temporary one, the sums are written, and
  the last rename is ours. Only the process that commits a step comes here.
  """

  async def finalize(self) -> None:
    """Commits a step, or an item within it."""
    final = self._final_path
    if not final.name.isdecimal():
      await super().finalize()
      return
    sealed = final.parent / f'{final.name}{_TEMPORARY}-sealed'
    try:
      self._final_path = sealed
      await super().finalize()
    finally:
      self._final_path = final
    await asyncio.to_thread(write, Path(sealed))
    os.rename(sealed, final)
    await asyncio.to_thread(_sync_folder, Path(final.parent))


def steps(directory: Path) -> list[int]:
  """The steps in a directory of checkpoints, newest first, sound or not."""
  if not directory.is_dir():
    return []
  names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
  return sorted((int(n) for n in names if n.isdecimal()), reverse=True)


def recover(directory: Path) -> None:
  """Makes a directory of checkpoints fit to go on with; the only writer calls.

  Removes what a killed run was writing or deleting. Other steps that are
  damaged are moved to the folder `corrupt` of the run, each with a warning that
  names the step and the file; of those older than the newest intact one the
  scores and the names of the files are looked at.

  Args:
    directory: WORKDIR/checkpoints.

  Raises:
    ValueError: there are steps, and none is intact; nothing has been changed.
  """
  faults, newest = {}, None
  for step in steps(directory):
    # Of the older ones Orbax reads the scores at once, and nothing else.
    part = '' if newest is None else 'metrics/'
    faults[step] = fault(directory / str(step), part=part)
    if faults[step] is None and newest is None:
      newest = step
  if faults and newest is None:
    raise ValueError(
      f'no checkpoint in {directory} is intact ('
      + '; '.join(f'step {step}: {what}' for step, what in faults.items())
      + '); put back a copy of one, or start anew in another --workdir'
    )
  remove_unfinished(directory)
  for step, what in faults.items():
    if what is None:
      continue
    path = directory / str(step)
    if step < newest and _is_half_deleted(path, directory / str(newest)):
      _remove(path)
    else:
      _move_aside(path, what, newest)


def remove_unfinished(directory: Path) -> None:
  """Removes the steps in a directory whose saving was never finished."""
  if directory.is_dir():
    for entry in directory.iterdir():
      if _TEMPORARY in entry.name:
        _remove(entry)


def _remove(path: Path) -> None:
  """Removes what a run that ended had half written or half deleted."""
  shutil.rmtree(path, ignore_errors=True)
  logging.info('removed the unfinished checkpoint %s', path)


def _move_aside(step: Path, what: str, newest: int) -> None:
  """Takes a damaged step out of the way; an older one of its name goes."""
  aside = step.parents[1] / ASIDE / step.name
  shutil.rmtree(aside, ignore_errors=True)
  aside.parent.mkdir(exist_ok=True)
  os.rename(step, aside)
  logging.warning(
    'the checkpoint of step %s is damaged: %s; it was moved to %s%s',
    step.name,
    what,
    aside,
    f', going on from step {newest}' if int(step.name) > newest else '',
  )
