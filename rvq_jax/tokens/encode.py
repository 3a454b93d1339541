"""A data set to token shards."""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rvq_jax.data.decoding import DecodeErrors, decode_record
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import resize_and_center_crop
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.io import explain_full_disk
from rvq_jax.tokens import packing, shards
from rvq_jax.tokens.card import CARD, FORMAT, VERSION, read_card, write_card
from rvq_jax.tokens.records import TokenRecord, to_bytes
from rvq_jax.tokens.tiling import encode_images, grid_shape
from rvq_jax.training import progress

_BATCH_PIXELS, _MAX_BATCH = 2**21, 256


def side(tokenizer: Tokenizer, image_size: int | None) -> int | None:
  """The side to crop to: that of training for None, none at all for 0."""
  if image_size is None:
    return tokenizer.config['data.image_size']
  return image_size or None


def batch_size(image_size: int) -> int:
  """Images at a time: a choice of ours, since ids may depend on it."""
  return max(1, min(_MAX_BATCH, _BATCH_PIXELS // image_size**2))


def encode_dataset(
  tokenizer: Tokenizer,
  source: Source,
  folder,
  *,
  about: Mapping[str, Any],
  image_size: int | None,
  shard_size: int = 4096,
) -> dict[str, Any]:
  """Writes the tokens of a data set as shards.

  A shard has its name once it is whole and its entry in the card after that,
  so the same call goes on where one was interrupted, with the same result. It
  also makes anew a shard that was removed.

  Args:
    tokenizer: the model.
    source: the images.
    folder: to write to; made where it is missing.
    about: what the card says of model and input; JSON values.
    image_size: side to which images are scaled and centre-cropped; None for
      each image in its own size.
    shard_size: images a shard.

  Returns:
    The card.

  Raises:
    ValueError: the folder holds other tokens, or more than 1 % of the images
      cannot be read.
    OSError: the disk is full.
  """
  folder = Path(folder)
  if shard_size < 1 or (image_size is not None and image_size < 1):
    raise ValueError(
      'expected shard_size and image_size of at least 1, got '
      f'{shard_size} and {image_size}'
    )
  count = len(source)
  rows = [
    range(start, min(start + shard_size, count))
    for start in range(0, count, shard_size)
  ]
  total = len(rows)
  wanted = _card(tokenizer, source, about, image_size, shard_size)
  card = _begin(folder, wanted, total)
  made = {
    i: shard['images']
    for i, shard in enumerate(card['shards'])
    if (folder / shard['file']).exists()
  }
  started, before = time.perf_counter(), sum(made.values())
  with (
    progress.logs_above_bars(),
    tqdm(total=count, unit='image', desc='encode', disable=None) as bar,
  ):
    done = sum(len(rows[i]) for i in made)
    bar.update(done)
    skips = _Skips(count, done - before, bar)
    for number in sorted(set(range(total)) - set(made)):
      records = list(
        _encode_rows(tokenizer, source, rows[number], image_size, skips, bar)
      )
      path = folder / f'tokens-{number:05d}-of-{total:05d}.array_record'
      with explain_full_disk(
        folder,
        'give the same command again: it resumes after the last complete shard',
      ):
        # In the place of the entry of a shard that was removed.
        entry = shards.write_shard(path, records)
        card['shards'][number : number + 1] = [entry]
        _write_unfinished(folder, card, rows)
  card['complete'] = True
  with explain_full_disk(
    folder,
    'give the same command again: it resumes after the last complete shard',
  ):
    write_card(folder, card)
  seconds = time.perf_counter() - started
  new = card['images'] - before
  logging.info(
    '%s: %d images in %d shards, %d skipped; %.1f s, %.0f images/s',
    *(folder, card['images'], total, card['skipped']),
    *(seconds, new / max(seconds, 1e-9)),
  )
  return card


def _write_unfinished(folder, card, rows) -> None:
  """Writes the card with the sums over its shards."""
  card['images'] = sum(shard['images'] for shard in card['shards'])
  covered = sum(map(len, rows[: len(card['shards'])]))
  card['skipped'] = covered - card['images']
  card['complete'] = False
  write_card(folder, card)


def _digest(source: Source) -> str | None:
  """SHA-256 of what tells the images from others, None where nothing does."""
  names = source.identity()
  if names is None:
    return None
  return hashlib.sha256(b'\0'.join(map(os.fsencode, names))).hexdigest()


class _Skips(DecodeErrors):
  """Counts on from those of an earlier call, on the progress bar."""

  def __init__(self, total, before, bar):
    super().__init__(total)
    self._before, self._bar = before, bar
    self._show()

  @property
  def count(self) -> int:
    """Number of records skipped, of earlier calls too."""
    return self._before + len(self.rows)

  def add(self, index: int, name: str, reason: str) -> None:
    """See `DecodeErrors.add`."""
    super().add(index, name, reason)
    self._bar.update(1)
    self._show()

  def _show(self):
    if self.count:
      self._bar.set_postfix(skipped=self.count)


def _card(tokenizer, source, about, image_size, shard_size):
  """The card of an encoding that has not begun."""
  return {
    'format': FORMAT,
    'version': VERSION,
    'complete': False,
    'model_hash': tokenizer.model_hash,
    'step': tokenizer.step,
    'codebook_size': tokenizer.codebook_size,
    'factor': tokenizer.factor,
    'codes': tokenizer.codes,
    'dtype': packing.id_dtype(tokenizer.codebook_size).name,
    **about,
    'input_digest': _digest(source),
    'image_size': image_size,
    'grid': image_size
    and list(grid_shape(image_size, image_size, tokenizer.factor)),
    'input_images': len(source),
    'shard_size': shard_size,
    'images': 0,
    'skipped': 0,
    'shards': [],
  }


def _begin(folder: Path, wanted: dict[str, Any], total: int) -> dict[str, Any]:
  """The card to go on with: that of the folder, or a new one."""
  apart = ('complete', 'images', 'skipped', 'shards', 'input_digest')
  if (folder / CARD).exists():
    card = read_card(folder)
    differ = [
      f'{name} {card.get(name)!r}, now {wanted[name]!r}'
      for name in wanted
      if name not in apart and card.get(name) != wanted[name]
    ]
    if differ:
      raise ValueError(
        f'{folder} holds the tokens of another encoding ({"; ".join(differ)}); '
        'name another --output, or remove it'
      )
    digest = card.get('input_digest')
    if digest and digest != wanted['input_digest']:
      raise ValueError(
        f'{folder} was begun with other images than {wanted.get("input")} '
        'holds now (files were renamed or replaced, or it is another version '
        'of the set); bring those back, or name another --output, or remove it'
      )
    if len(card['shards']) > total:
      raise ValueError(
        f'{folder / CARD} is damaged: expected at most {total} shards, got '
        f'{len(card["shards"])}; remove {folder} and encode again'
      )
    for shard in card['shards']:
      if (folder / shard['file']).exists():
        shards.check_shard(folder, shard)
    return card
  try:
    with explain_full_disk(
      folder,
      'give the same command again: it resumes after the last complete shard',
    ):
      folder.mkdir(parents=True, exist_ok=True)
      write_card(folder, wanted)
  except OSError as error:
    if error.strerror is None:  # it has been explained
      raise
    raise ValueError(f'cannot write to {folder}: {error.strerror}') from error
  return wanted


def _encode_rows(
  tokenizer, source, rows, image_size, skips, bar
) -> Iterator[bytes]:
  """Yields the records of some rows; decodes ahead in threads."""
  dtype = packing.id_dtype(tokenizer.codebook_size)
  size = batch_size(image_size) if image_size else 1
  images = _decoded(source, rows, image_size, 2 * size, skips)
  while batch := list(itertools.islice(images, size)):
    # The last batch is filled up: another size would be compiled anew.
    pixels = [image for _, image, _ in batch]
    pixels += [pixels[-1]] * (size - len(batch))
    ids = encode_images(tokenizer, np.stack(pixels))
    for (row, image, name), grid in zip(batch, ids, strict=False):
      label = int(source.labels[row])
      record = TokenRecord(grid, *image.shape[:2], name, label, row)
      yield to_bytes(record, dtype)
    bar.update(len(batch))


def _decoded(source, rows, image_size, ahead, skips):
  """Yields (row, image, name) of the rows that can be read, in order."""
  transform = np.asarray
  if image_size:
    transform = functools.partial(resize_and_center_crop, size=image_size)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    waiting = collections.deque()
    rows = iter(rows)
    while True:
      for row in itertools.islice(rows, ahead - len(waiting)):
        waiting.append(
          (row, pool.submit(decode_record, source, row, transform))
        )
      if not waiting:
        return
      row, task = waiting.popleft()
      image, name, reason = task.result()
      if image is None:
        skips.add(row, name, reason)
      else:
        yield row, image, name
