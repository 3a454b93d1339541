"""A data set as tokens: a folder of NumPy files that any framework reads.

ids.npy     [N, H, W] or [N, H, W, L], the smallest unsigned integer for K
labels.npy  int32 [N], -1 without a label
names.txt   N lines
meta.json   model, K, factor, source, rows_done, and the skipped rows: images
            that could not be decoded; their ids are 0
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from rvq_jax.data.decoding import DecodeErrors, decode_ahead
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import resize_and_center_crop
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.io import explain_full_disk, lock, read_json, write_atomic
from rvq_jax.tokens import tiling

META, FORMAT = 'meta.json', 'rvq_jax tokens 1'
_MAX_META_BYTES = 2**26


def batch_size(image_size: int) -> int:
  """Images per call of the model; fixed, since ids may depend on it."""
  return max(1, min(256, 2**21 // image_size**2))


def encode_dataset(
  tokenizer: Tokenizer,
  source: Source,
  folder,
  *,
  image_size: int | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes the tokens of a data set as a folder, on all devices of the host.

  After an interruption, even by SIGKILL, the same call resumes and ends with
  the same files.

  Args:
    tokenizer: the model.
    source: N images.
    folder: new, empty, or of an earlier call with the same arguments.
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
  labels = np.asarray(source.labels, np.int32)
  shape, dtype = tiling.ids_type(tokenizer, size, size)
  meta = {
    'format': FORMAT,
    'model_hash': tokenizer.model_hash,
    'codebook_size': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'num_images': len(source),
    'image_size': size,
    'grid': list(shape),
    'source': dict(about or {}),
    'source_digest': hashlib.sha256(names + labels.tobytes()).hexdigest(),
    'rows_done': 0,
    'skipped': [],
  }
  with explain_full_disk(folder, 'run the same command again: it resumes'):
    new = not (folder / META).exists()
    made = _make_partial(folder) if new else folder
    # The lock stays with the folder when it is renamed.
    with lock(made, folder, 'name another output folder'):
      if new:
        _create(made, folder, meta, labels, dtype)
      meta = _resume(folder, meta)
      _encode_rows(tokenizer, source, folder, meta)
  return meta


def check_new(folder: Path) -> None:
  """Raises ValueError unless a folder is new or empty."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise ValueError(f'expected a new or empty output folder, got {folder}')


def _make_partial(folder: Path) -> Path:
  """Makes the folder that bears its name once it is complete."""
  check_new(folder)
  partial = folder.with_name(f'.{folder.name}.partial')
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError, PermissionError) as error:
    raise ValueError(f'cannot write to {folder}: {error.strerror}') from error
  return partial


def _create(partial, folder, meta, labels, dtype) -> None:
  """Fills a new folder, whose ids are 0; a failure leaves nothing of it."""
  try:
    shape = (meta['num_images'], *meta['grid'])
    np.lib.format.open_memmap(partial / 'ids.npy', 'w+', dtype, shape)
    np.save(partial / 'labels.npy', labels, allow_pickle=False)
    write_atomic(partial / 'names.txt', '')
    write_atomic(partial / META, json.dumps(meta))
    os.rename(partial, folder)
  except OSError:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _resume(folder, wanted) -> dict[str, Any]:
  """Checks the folder of an earlier call; drops what it did not commit."""
  meta, _, _, names = _open(folder)
  for name in wanted:
    if name not in ('rows_done', 'skipped') and meta.get(name) != wanted[name]:
      raise ValueError(
        f'{folder} has another {name} ({meta.get(name)}, not {wanted[name]}); '
        'name another output folder'
      )
  for path in folder.glob('.*.partial'):  # of a write that was killed
    path.unlink()
  names = names[: meta['rows_done']]
  write_atomic(folder / 'names.txt', ''.join(f'{name}\n' for name in names))
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

  Ids are written to the file, not through a memory map: on a full disk a
  write raises, a memory map ends the process by SIGBUS.
  """
  count, done, size = len(source), meta['rows_done'], meta['image_size']
  batch = batch_size(size)
  tokenizer, by_rows = tiling.over_devices(tokenizer, batch)
  crop = functools.partial(resize_and_center_crop, size=size)
  rows = decode_ahead(
    source, range(done, count), crop, _Skipped(meta), 2 * batch
  )
  with (
    tqdm(total=count, initial=done, unit='image', disable=None) as bar,
    open(folder / 'ids.npy', 'r+b') as ids_file,
    open(folder / 'names.txt', 'a', encoding='utf-8') as names_file,
  ):
    row_bytes = _open(folder)[1][0].nbytes
    ids_file.seek((done - count) * row_bytes, os.SEEK_END)
    while part := list(itertools.islice(rows, batch)):
      # The last batch is filled up: another shape would compile again.
      images = np.zeros((batch, size, size, 3), np.uint8)
      for i, (_, image, _) in enumerate(part):
        images[i] = 0 if image is None else image
      ids = tiling.encode_images(tokenizer, images, placement=by_rows)
      ids = ids[: len(part)]
      ids[[image is None for _, image, _ in part]] = 0
      ids_file.write(ids.tobytes())
      names_file.writelines(f'{repr(name)[1:-1]}\n' for *_, name in part)
      for file in (ids_file, names_file):
        file.flush()
        os.fsync(file.fileno())
      meta['rows_done'] += len(part)
      write_atomic(folder / META, json.dumps(meta))
      bar.update(len(part))


def _open(folder):
  """Opens and checks a folder: meta, ids (memory-mapped), labels, names."""
  folder = Path(folder)
  try:
    meta = read_json(folder / META, _MAX_META_BYTES) or {}
    if meta.get('format') != FORMAT:
      raise ValueError(f'expected {META} of format {FORMAT!r}')
    ids = np.load(folder / 'ids.npy', mmap_mode='r', allow_pickle=False)
    labels = np.load(folder / 'labels.npy', allow_pickle=False)
    names = (folder / 'names.txt').read_text('utf-8').split('\n')[:-1]
    dtype = np.min_scalar_type(meta['codebook_size'] - 1)
    expected = dtype, (meta['num_images'], *meta['grid']), np.int32
    if (ids.dtype, ids.shape, labels.dtype) != expected or not (
      meta['rows_done'] <= min(len(names), len(ids)) and len(ids) == len(labels)
    ):
      raise ValueError(f'{META} does not describe the other files')
  except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{folder} holds no tokens, or damaged ones: {error}; encode again'
    ) from error
  return meta, ids, labels, names


class TokenDataset:
  """A complete folder of tokens with random access, also a Grain source.

  Item i is {'ids': [H, W] or [H, W, L], 'label': int32, 'name': str}.

  Args:
    folder: that `encode_dataset` wrote.

  Attributes:
    meta, ids, labels, names: the four files; ids is memory-mapped.

  Raises:
    ValueError: the folder is incomplete, damaged, or holds something else.
  """

  def __init__(self, folder):
    self._folder = folder
    self.meta, self.ids, self.labels, self.names = _open(folder)
    if self.meta['rows_done'] != len(self):
      raise ValueError(
        f'{folder} has {self.meta["rows_done"]} of {len(self)} rows; run the '
        'same launch/encode.py again to complete it'
      )

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, index) -> dict[str, Any]:
    ids, size = np.array(self.ids[index]), self.meta['codebook_size']
    if ids.max() >= size:
      raise ValueError(
        f'{self._folder} is damaged: expected ids below {size}, got {ids.max()}'
      )
    return {'ids': ids, 'label': self.labels[index], 'name': self.names[index]}

  def __reduce__(self):
    return TokenDataset, (self._folder,)

  def __repr__(self):
    return f'TokenDataset({str(self._folder)!r})'


def decode_dataset(tokenizer: Tokenizer, folder, output) -> int:
  """Writes the images of a folder of tokens as PNG files, numbered by row.

  Args:
    tokenizer: the model that made the tokens.
    folder: of the tokens.
    output: new or empty folder.

  Returns:
    The number of images; skipped rows have none.

  Raises:
    ValueError: the tokens are of another model, or the output is not empty.
  """
  dataset, output = TokenDataset(folder), Path(output)
  tiling.check_model(tokenizer, dataset.meta['model_hash'], folder)
  check_new(output)
  size = dataset.meta['image_size']
  batch, skipped = batch_size(size), {x['row'] for x in dataset.meta['skipped']}
  with explain_full_disk(output, 'decode to another folder'):
    output.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(dataset), batch), disable=None):
      ids = dataset.ids[start : start + batch]
      # The last batch is filled up: another shape would compile again.
      filled = np.resize(ids, (batch, *ids.shape[1:]))
      images = tiling.decode_ids(tokenizer, filled, size, size)
      for row, image in enumerate(images[: len(ids)], start):
        if row not in skipped:
          Image.fromarray(image).save(output / f'{row:08d}.png')
  return len(dataset) - len(skipped)
