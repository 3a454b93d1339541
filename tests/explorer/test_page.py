"""What the explorer's page is given, and its server."""

import base64
import contextlib
import html.parser
import http.client
import io
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from rvq_jax.explorer import content, page
from rvq_jax.metrics import to_uint8


def picture(url):
  data = base64.b64decode(url.removeprefix('data:image/png;base64,'))
  return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'quantizer': 'residual', 'depth': 2},
    pytest.param({'quantizer': 'product'}, marks=pytest.mark.slow),
  ],
)
def test_the_page_shows_ids_and_reconstructions(make_data, images, fields):
  tokenizer, data = make_data(**fields)
  shown, (_, image) = data['images'][0], images[0]
  ids = np.asarray(tokenizer.encode(image[None]))
  assert shown['ids'] == ids.reshape(-1).tolist()
  assert (shown['rows'], shown['columns']) == (4, 6)
  np.testing.assert_array_equal(picture(shown['original']), image)
  made = np.asarray(to_uint8(tokenizer.decode(ids)))[0]
  np.testing.assert_array_equal(picture(shown['reconstructions'][-1]), made)
  if 'depth' in fields:
    first = np.asarray(to_uint8(tokenizer.decode(ids[..., :1])))[0]
    np.testing.assert_array_equal(picture(shown['reconstructions'][0]), first)
  assert len(shown['reconstructions']) == fields.get('depth', 1)


def test_neighbours_are_the_nearest_codes(make_data):
  tokenizer, data = make_data(quantizer='residual', depth=2)
  for level, content_ in enumerate(data['codes']):
    book = np.asarray(
      tokenizer.variables['codebook']['vq'][f'level_{level}']['embedding']
    )
    for code, pairs in content_['neighbours'].items():
      distances = np.linalg.norm(book - book[int(code)], axis=1)
      order = [i for i in np.argsort(distances) if i != int(code)][:8]
      assert [i for i, _ in pairs] == order
      np.testing.assert_allclose(
        [d for _, d in pairs], distances[order], atol=2e-3
      )


def test_a_code_alone_is_the_middle_of_a_grid_of_it(make_data):
  tokenizer, data = make_data()
  codes = data['codes'][0]
  code, place = list(codes['places'].items())[-1]
  made = to_uint8(tokenizer.decode(np.full((128, 3, 3), int(code))))
  expected = np.asarray(made)[0, 4:8, 4:8]
  y, x = (16 * n for n in divmod(place, codes['columns']))
  got = picture(codes['sheet'])[y : y + 16, x : x + 16]
  wanted = np.asarray(Image.fromarray(expected).resize((16, 16)))
  np.testing.assert_allclose(got, wanted.astype(int), atol=1)


def test_large_images_are_shrunk():
  assert content.shrink(np.zeros((900, 300, 3), np.uint8)).shape == (
    512,
    171,
    3,
  )


@pytest.fixture
def numbered(tmp_path):
  """A folder of ten images of their own greys: 3, 4 and 9 are no images."""
  (tmp_path / 'in').mkdir()
  for i in range(10):
    path = tmp_path / 'in' / f'{i}.png'
    Image.new('RGB', (8, 12), (20 * i,) * 3).save(path)
    if i in (3, 4, 9):
      path.write_bytes(b'no image')
  return tmp_path / 'in'


def test_an_unreadable_image_makes_room_for_the_next(
  make_tokenizer, numbered, caplog
):
  images = page.example_images(make_tokenizer(), 5, source=str(numbered))
  assert [(n, int(image[0, 0, 0])) for n, image in images] == [
    (f'{i}.png', 20 * i) for i in (0, 1, 2, 5, 6)
  ]
  assert all(image.shape == (12, 8, 3) for _, image in images)
  assert len(caplog.messages) == 2
  for name in ('3.png', '4.png'):
    assert f'skipped image {name}' in caplog.text


def test_as_many_as_can_be_read_are_shown(make_tokenizer, numbered):
  images = page.example_images(make_tokenizer(), 12, source=str(numbered))
  assert sorted(n for n, _ in images) == [
    f'{i}.png' for i in (0, 1, 2, 5, 6, 7, 8)
  ]


def test_an_unreadable_test_image_of_the_run_costs_no_page(
  make_tokenizer, tiny_config, image_folder, tmp_path
):
  folder = tmp_path / 'images'
  shutil.copytree(image_folder, folder)
  paths = sorted((folder / 'test').rglob('*.png'))
  paths[0].write_bytes(b'no image')
  tiny_config.data.name = f'folder:{folder}'
  images = page.example_images(make_tokenizer(), 3)
  names = [str(path.relative_to(folder)) for path in paths]
  assert [n for n, _ in images] == [names[i] for i in (1, 5, 10)]
  assert all(image.shape == (16, 16, 3) for _, image in images)


def test_where_no_image_can_be_read_there_is_one_line(make_tokenizer, numbered):
  for path in numbered.iterdir():
    path.write_bytes(b'no image')
  for source, count in ((numbered, 10), (numbered / '3.png', 1)):
    with pytest.raises(ValueError, match=f'none of {count} can') as error:
      page.example_images(make_tokenizer(), 5, source=str(source))
    assert '\n' not in str(error.value)


class _Elements(html.parser.HTMLParser):
  """Collects tags and the addresses that they load."""

  def __init__(self):
    super().__init__()
    self.tags, self.loaded = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.loaded += [v for k, v in attrs if k in ('src', 'href')]


def test_the_page_loads_nothing_and_escapes_names(make_data):
  text = page.page_html(make_data()[1])
  elements = _Elements()
  elements.feed(text)
  assert elements.loaded == [] and 'b' not in elements.tags
  assert elements.tags.count('script') == 2
  assert 'http://' not in text and 'https://' not in text
  assert '/*data*/' not in text and '/*script*/' not in text


@contextlib.contextmanager
def serving(tokenizer, data):
  server = page.make_server(tokenizer, data)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def post(url, data, **headers):
  request = urllib.request.Request(f'{url}/encode', data, headers)
  with urllib.request.urlopen(request) as answer:
    return json.load(answer)


def test_the_server_encodes_an_image_and_refuses_the_rest(make_data, images):
  tokenizer, data = make_data()
  buffer = io.BytesIO()
  Image.fromarray(images[1][1]).save(buffer, 'PNG')
  with serving(tokenizer, data) as url:
    with urllib.request.urlopen(url) as answer:
      assert b'"serves": true' in answer.read()
    answer = post(url, buffer.getvalue())
    assert answer['image']['ids'] == data['images'][1]['ids']
    for body, headers, status in (
      (b'no image', {}, 400),
      (b'x', {'Content-Length': str(2**40)}, 413),
      (buffer.getvalue(), {'Origin': 'http://elsewhere.example'}, 403),
      (buffer.getvalue(), {'Host': 'elsewhere.example'}, 403),
    ):
      with pytest.raises(urllib.error.HTTPError) as error:
        post(url, body, **headers)
      assert error.value.code == status
      error.value.close()


def test_a_body_over_the_limit_is_answered_with_the_limit(make_data):
  with serving(*make_data()) as url:
    connection = http.client.HTTPConnection(url.removeprefix('http://'))
    connection.request('POST', '/encode', bytes(40 * 2**20))
    answer = connection.getresponse()
    assert answer.status == 413
    text = 'expected an image of at most 32 MiB, got 40.0 MiB; shrink it'
    assert answer.read().decode() == text
    connection.close()


def test_a_client_that_sends_nothing_more_is_not_waited_for(
  make_data, monkeypatch
):
  monkeypatch.setattr(page, '_PATIENCE', 0.2)
  with serving(*make_data()) as url:
    host = url.removeprefix('http://')
    lines = f'POST /encode HTTP/1.0\r\nHost: {host}\r\n'
    lines += f'Content-Length: {2**40}\r\n\r\n'
    name, port = host.split(':')
    with socket.create_connection((name, int(port)), timeout=20) as client:
      client.sendall(lines.encode())
      assert client.makefile('rb').readline().startswith(b'HTTP/1.0 413')
      with pytest.raises(OSError):
        for _ in range(20):
          time.sleep(0.5)
          client.sendall(b'x')


def test_a_port_that_is_taken_is_one_error(make_data):
  tokenizer, data = make_data()
  with (
    page.make_server(tokenizer, data) as server,
    pytest.raises(ValueError, match='cannot listen on 127.0.0.1'),
  ):
    page.make_server(tokenizer, data, server.server_port)
  with pytest.raises(ValueError, match='cannot listen'):
    page.make_server(tokenizer, data, 70000)
