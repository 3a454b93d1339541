"""Single files: images in, `.rvq` and images out."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from rvq_jax.data.transforms import decode_image
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.tokens import codecs, packing, rvq_file
from rvq_jax.tokens.tiling import decode_ids, encode_images

# Both without loss, so that a file holds the reconstruction to the byte.
_FORMATS = {
  '.png': ('PNG', {'compress_level': 3}),
  '.webp': ('WEBP', {'lossless': True}),
}


def encode_file(
  tokenizer: Tokenizer, image: np.ndarray, path
) -> rvq_file.TokenImage:
  """Writes one image as an .rvq file; a large one with a progress bar.

  Args:
    tokenizer: the model.
    image: uint8 [h, w, 3].
    path: of the file.

  Returns:
    What was written.

  Raises:
    ValueError: the image is too large, or the file cannot be written.
  """
  height, width = image.shape[:2]
  grid = encode_images(tokenizer, image[None], desc='encode')[0]
  tokens = rvq_file.TokenImage(
    ids=grid.reshape(*grid.shape[:2], -1),
    height=height,
    width=width,
    factor=tokenizer.factor,
    codebook_size=tokenizer.codebook_size,
    model_hash=bytes.fromhex(tokenizer.model_hash)[: rvq_file.HASH_BYTES],
  )
  write_atomic(path, rvq_file.to_bytes(tokens))
  return tokens


def encode_and_report(
  tokenizer: Tokenizer, source, path, *, compare: bool = True
) -> str:
  """Writes an image file as .rvq and says what it cost.

  Args:
    tokenizer: the model.
    source: image file.
    path: of the .rvq file.
    compare: measure JPEG, WebP and AVIF at the same size, too.

  Returns:
    Lines of text.

  Raises:
    ValueError: the image cannot be read, or is too large, or the file cannot
      be written.
  """
  image = read_image(source)
  tokens = encode_file(tokenizer, image, path)
  size = os.path.getsize(path)
  rows, columns, codes = tokens.ids.shape
  line = (
    f'{path}: {tokens.width} x {tokens.height} pixels as {columns} x {rows}'
    f'{f" x {codes}" if codes > 1 else ""} tokens of '
    f'{packing.packed_bits(tokens.codebook_size)} bits in {size:,} bytes'
  )
  if not compare:
    return line
  made = decode_file(tokenizer, path)
  return f'{line}\n{codecs.format_comparison(image, made, size)}'


def decode_file(tokenizer: Tokenizer, path) -> np.ndarray:
  """The image in an .rvq file.

  Args:
    tokenizer: the model that the file was written with.
    path: of the file.

  Returns:
    uint8 [h, w, 3], what `reconstruct_images` made of the original.

  Raises:
    ValueError: the file is damaged or of another model.
  """
  tokens = rvq_file.read(path)
  rvq_file.check_model(tokens, tokenizer, str(path))
  ids = tokens.ids if tokenizer.codes_per_position else tokens.ids[..., 0]
  size = tokens.height, tokens.width
  return decode_ids(tokenizer, ids[None], *size, desc='decode')[0]


def check_format(extension: str) -> None:
  """Refuses an extension of which images are not written without loss.

  Args:
    extension: as '.png'.

  Raises:
    ValueError: it is another than those known.
  """
  if extension.lower() not in _FORMATS:
    raise ValueError(
      f'expected {" or ".join(_FORMATS)}, which keep the reconstruction to the '
      f'byte, got {extension!r}'
    )


def write_image(path, image: np.ndarray) -> None:
  """Writes an image without loss.

  Args:
    path: ends in .png or .webp.
    image: uint8 [h, w, 3].

  Raises:
    ValueError: another ending, or the file cannot be written.
  """
  extension = Path(path).suffix
  check_format(extension)
  kind, options = _FORMATS[extension.lower()]
  buffer = io.BytesIO()
  try:
    Image.fromarray(image).save(buffer, kind, **options)
  except OSError as error:  # WebP holds 16383 pixels a side
    raise ValueError(f'cannot write {path}: {error}; use .png') from error
  write_atomic(path, buffer.getvalue())


def read_image(path) -> np.ndarray:
  """Reads an image file as uint8 [h, w, 3].

  Raises:
    ValueError: it cannot be read.
  """
  try:
    return decode_image(Path(path).read_bytes(), name=str(path))
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error


def write_atomic(path, data: bytes) -> None:
  """Writes a file that has its name only once it is whole.

  Raises:
    ValueError: it cannot be written.
  """
  path = Path(path)
  partial = path.with_name(f'.{path.name}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    os.replace(partial, path)
  except OSError as error:
    raise ValueError(f'cannot write {path}: {error.strerror}') from error
