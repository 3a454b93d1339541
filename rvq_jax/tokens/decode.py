"""Token shards back to images."""

import concurrent.futures
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.tokens import files
from rvq_jax.tokens.encode import batch_size
from rvq_jax.tokens.records import TokenRecord
from rvq_jax.tokens.shards import TokenSource
from rvq_jax.tokens.tiling import decode_ids
from rvq_jax.training import writers

ABOUT, NAMES = 'decoded.json', 'names.jsonl'


def decode_dataset(
  tokenizer: Tokenizer, folder, output, *, extension: str = '.png'
) -> int:
  """Writes the images of a folder of token shards.

  OUTPUT/NNNNNNNN.png bears the place of the image in the input of the
  encoding; names.jsonl says the name and the label of each. Images that are
  there already are left alone, so the same call goes on after an interruption.

  Args:
    tokenizer: the model that made the tokens.
    folder: of the shards.
    output: folder to write to; made where it is missing.
    extension: '.png' or '.webp', both without loss.

  Returns:
    The number of images.

  Raises:
    ValueError: the tokens are damaged or of another model, or the output
      holds other images.
  """
  files.check_format(extension)
  source = TokenSource(folder)
  card = source.card
  if card['model_hash'] != tokenizer.model_hash:
    raise ValueError(
      f'{folder} was made with the model {card["model_hash"][:16]} and this '
      f'one is {tokenizer.model_hash[:16]}; give the --workdir and --step '
      'that it was encoded with'
    )
  output = Path(output)
  _begin(output, source, extension)
  started = time.perf_counter()
  size = batch_size(card['image_size']) if card.get('image_size') else 1
  with (
    writers.logs_above_bars(),
    tqdm(total=len(source), unit='image', desc='decode', disable=None) as bar,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    lines = []
    for batch in _batches(source, size):
      paths = [output / f'{r.index:08d}{extension}' for r in batch]
      lines += [_line(p, r) for p, r in zip(paths, batch, strict=True)]
      if not all(path.exists() for path in paths):
        images = _decode(tokenizer, batch, size)
        list(pool.map(files.write_image, paths, images))
      bar.update(len(batch))
  files.write_atomic(output / NAMES, ''.join(lines).encode())
  seconds = time.perf_counter() - started
  logging.info(
    '%s: %d images; %.1f s, %.0f images/s',
    *(output, len(source), seconds, len(source) / max(seconds, 1e-9)),
  )
  return len(source)


def _begin(output, source, extension):
  """Refuses a folder with the images of other tokens."""
  hashes = [shard['sha256'] for shard in source.card['shards']]
  about = json.dumps({'shards': hashes, 'extension': extension})
  path = output / ABOUT
  found = path.read_text() if path.is_file() else None
  if found != about and output.is_dir() and any(output.iterdir()):
    raise ValueError(
      f'{output} holds other files; name another --output, or remove it'
    )
  files.write_atomic(path, about.encode())


def _batches(source: TokenSource, size: int) -> Iterator[list[TokenRecord]]:
  """Yields up to `size` records of one image size at a time."""
  batch = []
  for i in range(len(source)):
    record = source[i]
    like = batch and record[1:3] == batch[0][1:3]
    if batch and (len(batch) == size or not like):
      yield batch
      batch = []
    batch.append(record)
  if batch:
    yield batch


def _decode(tokenizer, batch, size):
  """The images of records of one size; the batch is filled up."""
  ids = [record.ids for record in batch]
  ids = np.stack(ids + [ids[-1]] * (size - len(batch))).astype(np.int32)
  height, width = batch[0].height, batch[0].width
  return decode_ids(tokenizer, ids, height, width)[: len(batch)]


def _line(path, record):
  """An image's line in names.jsonl."""
  about = {'file': path.name, 'name': record.name, 'label': record.label}
  return json.dumps(about) + '\n'
