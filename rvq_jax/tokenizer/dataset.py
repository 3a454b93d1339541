"""A data set as tokens: a folder of NumPy files that any framework reads.

ids.npy     [N, H, W], [N, H, W, L] or [N, T], the smallest unsigned integer
            for K
labels.npy  int32 [N], -1 without a label
names.txt   N lines
meta.json   model, K, factor, source, rows_done; skipped: the rows of unreadable
            images, with ids 0; for multi-scale tokens the sides of the scales
            and their offsets in T
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from rvq_jax.io import claim, read_json
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.tokenizer import Tokenizer

META, FORMAT = 'meta.json', 'rvq_jax tokens 2'
MAX_META_BYTES = 2**26


def batch_size(image_size: int) -> int:
  """Images per model call; fixed, since ids may depend on it."""
  return max(1, min(256, 2**21 // image_size**2))


def open_folder(
  folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, list[str]]:
  """Opens and checks a folder: meta, ids (memory-mapped), labels, names."""
  folder = Path(folder)
  try:
    meta = read_json(folder / META, MAX_META_BYTES) or {}
    if meta.get('format') != FORMAT:
      raise ValueError(f'expected {META} of format {FORMAT!r}')
    ids = np.load(folder / 'ids.npy', mmap_mode='r', allow_pickle=False)
    labels = np.load(folder / 'labels.npy', allow_pickle=False)
    names = (folder / 'names.txt').read_text('utf-8').split('\n')[:-1]
    dtype = np.min_scalar_type(meta['codebook_size'] - 1)
    expected = dtype, (meta['num_images'], *meta['grid']), np.int32
    if (ids.dtype, ids.shape, labels.dtype) != expected or not (
      meta['rows_done'] <= min(len(names), len(ids))
      and len(ids) == len(labels)
      and all(0 <= x['row'] < len(ids) for x in meta['skipped'])
    ):
      raise ValueError(f'{META} does not describe the other files')
  except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{folder} holds no tokens, or damaged ones: {error}; encode again'
    ) from error
  return meta, ids, labels, names


class TokenDataset:
  """A complete folder of tokens with random access, also a Grain source.

  Item i is {'ids': [H, W], [H, W, L] or [T], 'label': int32, 'name': str}. Rows
  of unreadable images are not items.

  >>> from rvq_jax import TokenDataset
  >>> tokens = TokenDataset('tokens')  # from rvq encode
  >>> len(tokens), tokens[0]['ids'].shape, tokens[0]['name']
  (11, (4, 4), 'test/class0/000.png')

  Args:
    folder: from `encoding.encode_dataset`. Its four files are the attributes
      meta, ids (memory-mapped), labels and names; item i is their row rows[i].
    dtype: dtype of an item's ids, an integer that holds K - 1; None: as stored.
      PyTorch's embeddings take no unsigned integers of 16 bits.

  Raises:
    ValueError: the folder is incomplete, damaged, or holds something else.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    dtype: npt.DTypeLike | None = None,
  ):
    self._folder, self._dtype = folder, dtype
    self.meta, self.ids, self.labels, self.names = open_folder(folder)
    if dtype is not None and not _holds(dtype, self.meta['codebook_size'] - 1):
      raise ValueError(
        'dtype: expected an integer type that holds '
        f'{self.meta["codebook_size"] - 1}, got {dtype!r}'
      )
    count, skipped = len(self.ids), [x['row'] for x in self.meta['skipped']]
    self.rows = np.delete(np.arange(count), skipped)
    if self.meta['rows_done'] != count:
      raise ValueError(
        f'{folder} has {self.meta["rows_done"]} of {count} rows; start the '
        'same rvq encode again to complete it'
      )

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row, size = self.rows[index], self.meta['codebook_size']
    ids = np.array(self.ids[row], self._dtype)
    if ids.max() >= size:
      raise ValueError(
        f'{self._folder} is damaged: expected ids below {size}, got {ids.max()}'
      )
    return {'ids': ids, 'label': self.labels[row], 'name': self.names[row]}

  def __reduce__(self):
    return TokenDataset, (self._folder, self._dtype)

  def __repr__(self):
    return f'TokenDataset({str(self._folder)!r})'


def _holds(dtype: Any, number: int) -> bool:
  """Whether a dtype is an integer type that holds 0 ... number."""
  try:
    return np.iinfo(dtype).max >= number
  except (TypeError, ValueError):
    return False


def decode_dataset(
  tokenizer: Tokenizer,
  folder: str | os.PathLike[str],
  output: str | os.PathLike[str],
) -> int:
  """Writes the images of a folder of tokens as PNG files, numbered by row.

  Returns their number; skipped rows have none. Raises ValueError if another
  encoder made the tokens, or the output is not new or empty.
  """
  dataset, output = TokenDataset(folder), Path(output)
  tokenizer.check_encoder(dataset.meta['encoder_hash'], folder)
  size = dataset.meta['image_size']
  batch, read = batch_size(size), set(dataset.rows.tolist())
  with claim(output, 'decode to another folder'):
    for start in tqdm(range(0, len(dataset.ids), batch), disable=None):
      ids = dataset.ids[start : start + batch]
      # Fill the last batch: another shape would compile again.
      filled = np.resize(ids, (batch, *ids.shape[1:]))
      images = tiling.decode_ids(tokenizer, filled, size, size)
      for row, image in enumerate(images[: len(ids)], start):
        if row in read:
          Image.fromarray(image).save(output / f'{row:08d}.png')
  return len(dataset)
