"""The explorer as one HTML file."""

import functools
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rvq_jax.data.datasets import open_images
from rvq_jax.data.decoding import decode_record
from rvq_jax.data.transforms import decode_crop, decode_image
from rvq_jax.explorer import content
from rvq_jax.io import check_file, write_atomic
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.build import RunData

# The beginning of a page: `check_output` lets only such a file be replaced.
MARKER = '<!doctype html><!-- rvq_jax explorer -->'


def example_images(
  tokenizer: Tokenizer,
  count: int,
  *,
  source: str | None = None,
  data_dir: str | None = None,
  split_file=None,
) -> list[tuple[str, np.ndarray]]:
  """Draws images (name, uint8 [h, w, 3]) for the page, with a fixed seed.

  Args:
    count: at most so many.
    source: an image, a folder or a data set, shown at its own size (cropped
      for multi-scale tokens); None: the test images of the run, cropped as in
      evaluation.
    data_dir: present folder of the data set; None: as in training.
    split_file: the run's; see `open_dataset`.

  Raises:
    ValueError: there is no such data set, or no readable image.
  """
  data = RunData(tokenizer.config)
  decode = functools.partial(decode_crop, size=data.image_size)
  decode = decode_image if source and tokenizer.any_size else decode
  if source and (path := Path(source)).is_file():
    return [(path.name, decode(path.read_bytes(), name=path.name))]
  if source:
    splits = open_images(source, data_dir=data_dir)
    images = splits.get('test') or next(iter(splits.values()))
  else:
    try:
      images = data.open_dataset(split_file, data_dir).test
    except ValueError as error:
      raise ValueError(f'{error}; or name images by --input') from error
  rows, shown = np.random.default_rng(0).permutation(len(images)), []
  rows[:count].sort()
  for row in rows.tolist():
    image, name, reason = decode_record(images, row, decode)
    if image is None:
      logging.warning('skipped %s: %s', name, reason)
    else:
      shown.append((name, image))
    if len(shown) == count:
      break
  if not shown:
    raise ValueError(f'none of {len(images)} images can be decoded: {reason}')
  return shown


def page_data(
  tokenizer: Tokenizer, name: str, images: list[tuple[str, np.ndarray]]
) -> dict[str, Any]:
  """The page's content for a model and `example_images`, as JSON values."""
  shown = [content.image_content(tokenizer, x, label) for label, x in images]
  return {
    'model': content.model_content(tokenizer, name),
    'images': shown,
    'codes': content.codes_content(tokenizer, shown),
  }


def page_html(data: dict[str, Any]) -> str:
  """The page of `page_data`; it loads nothing from elsewhere."""
  files = resources.files('rvq_jax.explorer')
  page, style, script = (
    (files / f'page.{kind}').read_text('utf-8')
    for kind in ('html', 'css', 'js')
  )
  # Inside <script> only '</' and '<!--' have a special meaning.
  text = json.dumps(data).replace('<', '\\u003c')
  page = page.replace('/*style*/', style).replace('/*script*/', script)
  return page.replace('/*data*/', text)


def check_output(path) -> None:
  """Raises ValueError if the path is not writable or holds no such page."""
  check_file(path)
  path = Path(path)
  begin = path.read_bytes() if path.is_file() else b''
  if path.exists() and not begin.startswith(MARKER.encode()):
    raise ValueError(
      f'{path} is not a page of the explorer and is not overwritten; name '
      'another output'
    )


def write_page(path, data: dict[str, Any]) -> None:
  """Writes the page of `page_data`; see `check_output`."""
  check_output(path)
  write_atomic(path, page_html(data))
