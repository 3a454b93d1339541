"""The explorer as one HTML file, or served on this machine alone."""

import contextlib
import functools
import http.server
import itertools
import json
import logging
import socket
import threading
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from rvq_jax.data import datasets
from rvq_jax.data.decoding import decode_record
from rvq_jax.data.sources import Source
from rvq_jax.data.transforms import (
  ImageError,
  decode_image,
  resize_and_center_crop,
)
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.explorer import content
from rvq_jax.tokens.files import write_atomic
from rvq_jax.tokens.inputs import open_input

HOST = '127.0.0.1'
_LONGEST_UPLOAD = 2**25
_PATIENCE = 10  # seconds that a client may take to send nothing


def example_images(
  tokenizer: Tokenizer,
  count: int,
  *,
  source: str | None = None,
  data_dir: str | None = None,
) -> list[tuple[str, np.ndarray]]:
  """Images for the page.

  Args:
    tokenizer: the model.
    count: how many at most.
    source: an image, a folder or a data set, its images in their own size;
      None for test images of the run's data set, cropped as in evaluation.
    data_dir: where tfds keeps prepared data; None: where it was in training.

  Returns:
    (name, uint8 [h, w, 3]) of each. In the place of one that cannot be read
    stands the next that can; a warning names it.

  Raises:
    ValueError: there is no such data set, or no image that can be read.
  """
  if source is None:
    config = tokenizer.config
    images = datasets.open_dataset(
      config['data.name'],
      split=config['data.split'],
      data_dir=data_dir or config['data.data_dir'],
    ).test
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    crop = functools.partial(
      resize_and_center_crop, size=config['data.image_size']
    )
    return _readable(images, rows.tolist(), crop)
  splits = open_input(source, data_dir)
  split = next(s for s in ('test', 'all', *splits) if s in splits)
  images = splits[split]
  return _readable(images, range(min(count, len(images))), np.asarray)


def _readable(
  source: Source, rows: Sequence[int], transform
) -> list[tuple[str, np.ndarray]]:
  """The images of some rows; for one that cannot be read, the next that can."""
  found, tried, last = [], set(rows), ''
  for first in rows:
    others = itertools.chain(range(first, len(source)), range(first))
    for row in itertools.chain([first], (r for r in others if r not in tried)):
      tried.add(row)
      image, name, reason = decode_record(source, row, transform)
      if image is not None:
        found.append((name, image))
        break
      last = f'{name}: {reason}'
      logging.warning('skipped image %s', last)
  if not found:
    raise ValueError(
      f'expected an image that can be decoded, and none of {len(source)} can '
      f'(the last is {last}); give others as --input'
    )
  return found


def page_data(
  tokenizer: Tokenizer, name: str, images: list[tuple[str, np.ndarray]]
) -> dict[str, Any]:
  """Everything that the page shows, as JSON values.

  Args:
    tokenizer: the model.
    name: of the model.
    images: name and uint8 [h, w, 3] of each.

  Returns:
    'model', 'images' and 'codes'.
  """
  shown = [
    content.image_content(tokenizer, image, label) for label, image in images
  ]
  return {
    'model': content.model_content(tokenizer, name),
    'images': shown,
    'codes': content.codes_content(tokenizer, shown),
  }


def page_html(data: dict[str, Any], *, serves: bool = False) -> str:
  """The page, which loads nothing from elsewhere.

  Args:
    data: from `page_data`.
    serves: whether a server behind it encodes images that are dropped.

  Returns:
    HTML.
  """
  files = resources.files('rvq_jax.explorer')
  page, style, script = (
    (files / f'page.{kind}').read_text('utf-8')
    for kind in ('html', 'css', 'js')
  )
  # Inside <script> nothing but '</' and '<!--' ends or changes what follows.
  text = json.dumps(
    data | {'serves': serves, 'longestUpload': _LONGEST_UPLOAD}
  ).replace('<', '\\u003c')
  parts = {'/*style*/': style, '/*script*/': script, '/*data*/': text}
  for mark, part in parts.items():
    page = page.replace(mark, part, 1)
  return page


def write_page(path, data: dict[str, Any]) -> None:
  """Writes the page to a file."""
  write_atomic(path, page_html(data).encode())


class _Handler(http.server.BaseHTTPRequestHandler):
  """GET / is the page; POST /encode takes the bytes of an image."""

  def do_GET(self):
    """Answers with the page."""
    if not self._is_local():
      return
    if self.path not in ('/', '/index.html'):
      self._send(404, 'text/plain', b'not found')
      return
    self._send(200, 'text/html; charset=utf-8', self.server.page)

  def do_POST(self):
    """Encodes an image."""
    if not self._is_local():
      return
    length = self.headers.get('Content-Length', '')
    if self.path != '/encode' or not length.isdecimal():
      self._send(404, 'text/plain', b'not found')
    elif int(length) > _LONGEST_UPLOAD:
      text = (
        f'expected an image of at most {_LONGEST_UPLOAD >> 20} MiB, got '
        f'{int(length) / 2**20:,.1f} MiB; shrink it'
      )
      self._send(413, 'text/plain', text.encode())
      self._hear_out(int(length))
    else:
      self._encode(self.rfile.read(int(length)))

  def _hear_out(self, left):
    """Drops the rest of a body: a client reads the answer after sending it."""
    self.connection.settimeout(_PATIENCE)
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_WR)
      while left > 0 and (part := self.rfile.read1(min(left, 2**20))):
        left -= len(part)

  def _encode(self, data):
    tokenizer = self.server.tokenizer
    try:
      with self.server.lock:
        image = decode_image(data)
        shown = content.image_content(tokenizer, image, 'your image')
        codes = content.codes_content(tokenizer, [shown])
    except ImageError as error:
      self._send(400, 'text/plain', str(error).encode())
      return
    text = json.dumps({'image': shown, 'codes': codes})
    self._send(200, 'application/json', text.encode())

  def _is_local(self) -> bool:
    """Refuses other sites' pages: neither their name nor their origin."""
    own = {f'{HOST}:{self.server.server_port}'}
    own.add(f'localhost:{self.server.server_port}')
    origin = self.headers.get('Origin')
    if self.headers.get('Host') in own and (
      origin is None or origin.removeprefix('http://') in own
    ):
      return True
    self._send(403, 'text/plain', b'expected a request from this machine')
    return False

  def _send(self, status, kind, body):
    self.send_response(status)
    self.send_header('Content-Type', kind)
    self.send_header('Content-Length', str(len(body)))
    self.send_header('Connection', 'close')
    self.end_headers()
    self.wfile.write(body)
    self.close_connection = True

  def log_message(self, format, *arguments):  # noqa: A002
    """Writes no line a request."""


def make_server(
  tokenizer: Tokenizer, data: dict[str, Any], port: int = 0
) -> http.server.ThreadingHTTPServer:
  """A server of the page on 127.0.0.1; call `serve_forever`.

  Args:
    tokenizer: encodes images that are dropped on the page.
    data: from `page_data`.
    port: to listen on; 0 for any that is free.

  Returns:
    The server; `server_port` says where it listens.

  Raises:
    ValueError: the port is taken or out of range.
  """
  try:
    server = http.server.ThreadingHTTPServer((HOST, port), _Handler)
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'cannot listen on {HOST}:{port}: {error}; give another --port, or 0'
    ) from error
  server.page = page_html(data, serves=True).encode()
  server.tokenizer, server.lock = tokenizer, threading.Lock()
  logging.info('http://%s:%d; Ctrl-C ends it', HOST, server.server_port)
  return server
