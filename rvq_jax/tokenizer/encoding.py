"""Encoding a data set: decoding, the model and the files overlap."""

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rvq_jax.data.decoding import DecodeErrors, decode_ahead, map_ahead
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import resize_and_center_crop
from rvq_jax.io import explain_full_disk, lock, write_atomic
from rvq_jax.quantize.scales import token_offsets
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.dataset import (
  FORMAT,
  META,
  batch_size,
  check_new,
  open_folder,
)
from rvq_jax.tokenizer.tokenizer import Tokenizer


def encode_dataset(
  tokenizer: Tokenizer,
  source: Source,
  folder,
  *,
  image_size: int | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes the tokens of a data set as a folder, on all devices.

  After an interruption, even by SIGKILL, the same call resumes and ends with
  the same files. Several processes of `jax.distributed` encode one share of
  the rows each, and end with the files of a single one; of a share, too, 1 %
  may be skipped.

  Args:
    tokenizer: the model.
    source: N images.
    folder: new, empty, or of an earlier call with the same arguments. All
      processes must see it.
    image_size: side to which images are scaled and center-cropped; None for
      that of training.
    about: what meta.json says of the source; JSON values.

  Returns:
    The content of meta.json.

  Raises:
    ValueError: the folder holds something else or is in use, or more than 1 %
      of the images cannot be decoded.
    OSError: the disk is full.
  """
  folder = Path(folder).resolve()
  size = image_size or tokenizer.config['data.image_size']
  names = '\0'.join(source.identity() or ()).encode('utf-8', 'replace')
  labels = _labels(source)
  meta = {
    'format': FORMAT,
    'model_hash': tokenizer.model_hash,
    'encoder_hash': tokenizer.encoder_hash,
    'codebook_size': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'num_images': len(source),
    'image_size': size,
    'grid': list(tiling.ids_type(tokenizer, size, size)[0]),
    **_scales(tokenizer.sides),
    'source': dict(about or {}),
    'source_digest': hashlib.sha256(names + labels.tobytes()).hexdigest(),
    'rows_done': 0,
    'skipped': [],
  }
  encode = _encode_folder if jax.process_count() == 1 else _encode_shares
  with explain_full_disk(folder, 'run the same command again: it resumes'):
    return encode(tokenizer, source, folder, meta)


def _scales(sides) -> dict[str, Any]:
  """What meta.json says of multi-scale tokens."""
  if not sides:
    return {}
  return {'sides': list(sides), 'offsets': token_offsets(sides)}


def _encode_folder(tokenizer, source, folder, meta) -> dict[str, Any]:
  """Encodes the rows of a source that a folder lacks."""
  new = not (folder / META).exists()
  made = _make_partial(folder) if new else folder
  # The lock stays with the folder when it is renamed.
  with lock(made, folder, 'name another output folder'):
    if new:
      _create(made, folder, source, meta)
    meta = _resume(folder, meta)
    _encode_rows(tokenizer, source, folder, meta)
  return meta


def _encode_shares(tokenizer, source, folder, meta) -> dict[str, Any]:
  """Encodes a source with all processes.

  Each encodes neighbouring batches into a folder beside the output. The first
  joins these. A folder that a single process began it completes alone.
  """
  process, count = jax.process_index(), jax.process_count()
  batch = batch_size(meta['image_size'])
  batches = -(-len(source) // batch)
  starts = [i * batches // count * batch for i in range(count)]
  shares = {
    folder.with_name(f'.{folder.name}.{i}of{count}'): rows
    for i, rows in enumerate(np.split(np.arange(len(source)), starts[1:]))
  }
  new = not (folder / META).exists()
  if new:
    check_new(folder)
  part, rows = list(shares.items())[process]
  if new and len(rows):
    own = meta | {'num_images': len(rows)}
    _encode_folder(tokenizer, source.subset(rows), part, own)
  multihost_utils.sync_global_devices('rvq_jax: shares are encoded')
  if process == 0:
    if new:
      _join(folder, source, meta, {x: r for x, r in shares.items() if len(r)})
    _encode_folder(tokenizer, source, folder, meta)
    for part in shares:
      shutil.rmtree(part, ignore_errors=True)
  multihost_utils.sync_global_devices('rvq_jax: shares are joined')
  return open_folder(folder)[0]


def _join(folder, source, meta, shares) -> None:
  """Makes a complete folder of those of the processes."""
  ids, names, skipped = [], '', []
  for part, rows in shares.items():
    found, own, *_ = open_folder(part)
    ids.append(own)
    names += (part / 'names.txt').read_text('utf-8')
    skipped += [x | {'row': x['row'] + int(rows[0])} for x in found['skipped']]
  meta = meta | {'rows_done': len(source), 'skipped': skipped}
  partial = _make_partial(folder)
  with lock(partial, folder, 'name another output folder'):
    _create(partial, folder, source, meta, ids, names)


def _labels(source) -> np.ndarray:
  return np.asarray(source.labels, np.int32)


def _make_partial(folder: Path) -> Path:
  """Makes the folder that bears its name once it is complete."""
  check_new(folder)
  partial = folder.with_name(f'.{folder.name}.partial')
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError, PermissionError) as error:
    raise ValueError(f'cannot write to {folder}: {error.strerror}') from error
  return partial


def _create(partial, folder, source, meta, ids=(), names='') -> None:
  """Fills a new folder, whose ids are 0 or given; a failure leaves nothing."""
  try:
    shape = (meta['num_images'], *meta['grid'])
    dtype = np.min_scalar_type(meta['codebook_size'] - 1)
    np.lib.format.open_memmap(partial / 'ids.npy', 'w+', dtype, shape)
    with open(partial / 'ids.npy', 'r+b') as file:
      file.seek(-sum(x.nbytes for x in ids), os.SEEK_END)
      for part in ids:
        file.write(part)
    np.save(partial / 'labels.npy', _labels(source), allow_pickle=False)
    write_atomic(partial / 'names.txt', names)
    write_atomic(partial / META, json.dumps(meta))
    os.rename(partial, folder)
  except OSError:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _resume(folder, wanted) -> dict[str, Any]:
  """Checks the folder of an earlier call; drops what it did not commit."""
  meta, _, _, names = open_folder(folder)
  for name in wanted:
    if name not in ('rows_done', 'skipped') and meta.get(name) != wanted[name]:
      raise ValueError(
        f'{folder} has another {name} ({meta.get(name)}, not {wanted[name]}); '
        'name another output folder'
      )
  for path in folder.glob('.*.partial'):  # of a write that was killed
    path.unlink()
  done = meta['rows_done']
  meta['skipped'] = [x for x in meta['skipped'] if x['row'] < done]
  write_atomic(folder / 'names.txt', ''.join(f'{x}\n' for x in names[:done]))
  return meta


class _Skipped(DecodeErrors):
  """Keeps the reasons in meta.json, which may hold some already."""

  def __init__(self, meta):
    super().__init__(meta['num_images'])
    self._entries = meta['skipped']
    self.rows.update(entry['row'] for entry in self._entries)

  def add(self, row, name, reason):
    super().add(row, name, reason)
    self._entries.append({'row': row, 'reason': reason})


def _encode_rows(tokenizer, source, folder, meta) -> None:
  """Encodes the rows from rows_done on.

  While a batch is written, the model works on the next one and threads decode
  two more. Ids are written to the file, not through a memory map: on a full
  disk a write raises, a memory map ends the process by SIGBUS.
  """
  count, done, size = len(source), meta['rows_done'], meta['image_size']
  batch = batch_size(size)
  tokenizer, by_rows = tiling.over_devices(tokenizer, batch)
  crop = functools.partial(resize_and_center_crop, size=size)
  rows = decode_ahead(
    source, range(done, count), crop, _Skipped(meta), 2 * batch
  )

  def encode(part):
    # The last batch is filled up: another shape would compile again.
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
    row_bytes = open_folder(folder)[1][0].nbytes
    ids_file.seek((done - count) * row_bytes, os.SEEK_END)
    for ids, names in map_ahead(encode, parts, ahead=2, threads=1):
      ids_file.write(ids.tobytes())
      names_file.writelines(f'{repr(name)[1:-1]}\n' for name in names)
      for file in (ids_file, names_file):
        file.flush()
        os.fsync(file.fileno())
      meta['rows_done'] += len(ids)
      write_atomic(folder / META, json.dumps(meta))
      bar.update(len(ids))
