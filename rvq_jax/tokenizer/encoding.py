"""Encodes a data set: decoding, the model and the files overlap."""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rvq_jax import sharding
from rvq_jax.data.decoding import DecodeErrors, decode_ahead, map_ahead
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import MAX_PIXELS
from rvq_jax.io import (
  check_folder,
  explain_full_disk,
  lock,
  read_json,
  write_atomic,
)
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.dataset import (
  FORMAT,
  MAX_META_BYTES,
  META,
  batch_size,
  open_folder,
)
from rvq_jax.tokenizer.tokenizer import Tokenizer

# The folder of one of several processes, and a killed process's first file.
_PARTIAL = re.compile(r'\.\d+of\d+|\.meta\.json\.\d+\.partial')


def encode_dataset(
  tokenizer: Tokenizer,
  source: Source,
  folder,
  *,
  image_size: int | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes a data set's tokens as a folder, on all devices; returns meta.json.

  After an interruption, even by SIGKILL, the same call resumes and ends with
  the same files. Each process of `jax.distributed` encodes a share of the rows
  and may skip at most 1 % of it; the files equal a single process's.

  Args:
    folder: new, empty, or from an earlier call with the same model, image size
      and images (names, labels, sizes, times of change; their folder may have
      moved); the same for all processes.
    image_size: side of the scaled and center-cropped images, at most 8,192
      pixels; None: as in training.
    about: `source` in meta.json; JSON values.

  Raises:
    ValueError: the folder holds something else or is in use, image_size is too
      large, or more than 1 % of the whole set is unreadable.
    OSError: the disk is full.
  """
  folder = Path(folder).resolve()
  size = tokenizer.image_size if image_size is None else image_size
  if not 1 <= size <= math.isqrt(MAX_PIXELS):
    raise ValueError(
      f'image_size: expected 1 to {math.isqrt(MAX_PIXELS)} pixels, got {size}'
    )
  names = '\0'.join(source.identity() or ()).encode('utf-8', 'replace')
  labels = np.asarray(source.labels, np.int32)
  stamps = source.stamps()
  meta = {
    'format': FORMAT,
    **tokenizer.about_ids(),
    'num_images': len(source),
    'image_size': size,
    'grid': list(tokenizer.ids_shape(size, size)),
    'source': dict(about or {}),
    'source_digest': hashlib.sha256(names + labels.tobytes()).hexdigest(),
    'source_files': hashlib.sha256(
      b'' if stamps is None else stamps.tobytes()
    ).hexdigest(),
    'rows_done': 0,
    'skipped': [],
  }
  encode = _encode_folder if jax.process_count() == 1 else _encode_shares
  with explain_full_disk(folder, 'start the same command again: it resumes'):
    return encode(tokenizer, source, folder, meta)


def check_output(folder) -> None:
  """Raises ValueError unless `encode_dataset` may write to a folder."""
  check_folder(folder, is_ours=_is_ours)


def _is_ours(folder) -> bool:
  """Whether a folder has a META, which `_resume` checks, or only shares."""
  names = [path.name for path in folder.iterdir()]
  return META in names or all(map(_PARTIAL.fullmatch, names))


def _encode_folder(tokenizer, source, folder, meta, shares=()) -> dict:
  """Encodes the missing rows of a folder; a new one begins with `shares`."""
  check_output(folder)
  new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  with lock(folder, folder, 'name another output folder'):
    if _is_unfilled(folder):
      _create(folder, new, source, meta, shares)
    meta = _resume(folder, meta)
    _encode_rows(tokenizer, source, folder, meta)
  return meta


def _encode_shares(tokenizer, source, folder, meta) -> dict[str, Any]:
  """Encodes neighbouring batches per process into a folder in the output.

  The first process joins them, and completes a folder that a single process
  began.
  """
  process, count = jax.process_index(), jax.process_count()
  batch = batch_size(meta['image_size'])
  batches = -(-len(source) // batch)
  starts = [i * batches // count * batch for i in range(1, count)]
  shares = {
    folder / f'.{i}of{count}': rows
    for i, rows in enumerate(np.split(np.arange(len(source)), starts))
  }
  place, rows = list(shares.items())[process]
  check_output(folder)
  if _is_unfilled(folder) and len(rows):
    share = meta | {'num_images': len(rows)}
    _encode_folder(tokenizer, source.subset(rows), place, share)
  multihost_utils.sync_global_devices('rvq_jax: shares are encoded')
  if process == 0:
    filled = [place for place, rows in shares.items() if len(rows)]
    _encode_folder(tokenizer, source, folder, meta, filled)
    for place in folder.iterdir():  # also of another number of processes
      if _PARTIAL.fullmatch(place.name):
        shutil.rmtree(place, ignore_errors=True)
  multihost_utils.sync_global_devices('rvq_jax: shares are joined')
  return open_folder(folder)[0]


def _is_unfilled(folder) -> bool:
  """Whether a folder lacks files of tokens, as after a killed `_create`."""
  if not (folder / META).exists():
    return True
  about = read_json(folder / META, MAX_META_BYTES) or {}
  return about.get('format') == FORMAT and about.get('rows_done') == -1


def _create(folder, new, source, meta, shares) -> None:
  """Fills a folder: ids are 0, or from `shares`; a failure leaves nothing.

  From its first META on, with rows_done -1, the folder is ours.
  """
  names: list[str] = []
  skipped: list[dict[str, Any]] = []
  errors = _Skipped(source, {'skipped': skipped})
  try:
    write_atomic(folder / META, json.dumps(meta | {'rows_done': -1}))
    shape = (meta['num_images'], *meta['grid'])
    dtype = np.min_scalar_type(meta['codebook_size'] - 1)
    ids = np.lib.format.open_memmap(folder / 'ids.npy', 'w+', dtype, shape)
    with open(folder / 'ids.npy', 'r+b') as file:
      file.seek(-ids.nbytes, os.SEEK_END)
      for share in shares:
        about, share_ids, _, share_names = open_folder(share)
        file.write(share_ids.data)
        for entry in about['skipped']:
          row, reason = entry['row'], entry['reason']
          errors.add(len(names) + row, share_names[row], reason)
        names += share_names
    labels = np.asarray(source.labels, np.int32)
    np.save(folder / 'labels.npy', labels, allow_pickle=False)
    write_atomic(folder / 'names.txt', ''.join(f'{x}\n' for x in names))
    meta = meta | {'rows_done': len(names), 'skipped': skipped}
    write_atomic(folder / META, json.dumps(meta))
  except (OSError, ValueError):
    for name in ('ids.npy', 'labels.npy', 'names.txt', META):
      (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
      if new:
        folder.rmdir()
    raise


def _resume(folder, wanted) -> dict[str, Any]:
  """Checks an earlier call's folder; drops rows after rows_done."""
  meta, _, _, names = open_folder(folder)
  meta.setdefault('source_files', wanted['source_files'])  # new in its format
  may_differ = 'rows_done', 'skipped', 'source'
  for name in wanted:
    if name not in may_differ and meta.get(name) != wanted[name]:
      raise ValueError(
        f'{folder}: expected {name} {wanted[name]}, got {meta.get(name)}; name '
        'another output folder'
      )
  for name in (META, 'names.txt'):
    for path in folder.glob(f'.{name}.*.partial'):  # from a killed write
      path.unlink()
  done = meta['rows_done']
  meta['skipped'] = [x for x in meta['skipped'] if x['row'] < done]
  write_atomic(folder / 'names.txt', ''.join(f'{x}\n' for x in names[:done]))
  return meta


class _Skipped(DecodeErrors):
  """Appends the reasons to meta.json."""

  def __init__(self, source, meta):
    super().__init__(source)
    self._entries = meta['skipped']
    self.rows.update(entry['row'] for entry in self._entries)

  def add(self, row, name, reason):
    super().add(row, name, reason)
    self._entries.append({'row': row, 'reason': reason})


def _encode_rows(tokenizer, source, folder, meta) -> None:
  """Encodes the rows from rows_done on.

  While this writes a batch, the model works on the next one and threads decode
  two more. It writes ids to the file, not to a memory map: on a full disk a
  write raises, a memory map ends the process by SIGBUS.
  """
  count, done, size = len(source), meta['rows_done'], meta['image_size']
  batch = batch_size(size)
  devices = jax.local_devices()
  used = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
  mesh = sharding.data_mesh(devices[:used])
  everywhere, by_rows = sharding.replicated(mesh), sharding.by_rows(mesh)
  tokenizer = copy.copy(tokenizer)
  tokenizer.variables = jax.device_put(tokenizer.variables, everywhere)
  rows = decode_ahead(
    source, range(done, count), size, _Skipped(source, meta), 2 * batch
  )

  def encode(part):
    # Fill the last batch: another shape would compile again.
    images = np.zeros((batch, size, size, 3), np.uint8)
    for i, (_, image, _) in enumerate(part):
      images[i] = 0 if image is None else image
    ids = tiling.encode_images(tokenizer, images, placement=by_rows)
    ids = ids[: len(part)]
    ids[[image is None for _, image, _ in part]] = 0
    return ids, [name for *_, name in part]

  parts = iter(lambda: list(itertools.islice(rows, batch)), [])
  with (
    tqdm(total=count, initial=done, unit='image', disable=None) as bar,
    open(folder / 'ids.npy', 'r+b') as ids_file,
    open(folder / 'names.txt', 'a', encoding='utf-8') as names_file,
  ):
    ids_file.seek(-open_folder(folder)[1][done:].nbytes, os.SEEK_END)
    for ids, names in map_ahead(encode, parts, ahead=2, threads=1):
      ids_file.write(ids.tobytes())
      names_file.writelines(f'{repr(name)[1:-1]}\n' for name in names)
      for file in (ids_file, names_file):
        file.flush()
        os.fsync(file.fileno())
      meta['rows_done'] += len(ids)
      write_atomic(folder / META, json.dumps(meta))
      bar.update(len(ids))
