"""What the explorer's page is given."""

import base64
import copy
import html.parser
import io
import shutil

import numpy as np
import pytest
from errors import one_line
from PIL import Image

from rvq_jax.explorer import content, page
from rvq_jax.metrics import to_uint8


def picture(url):
  data = base64.b64decode(url.removeprefix('data:image/png;base64,'))
  return np.asarray(Image.open(io.BytesIO(data)))


GRID, SCALES = [4, 6, 4], [[1, 1, 16], [3, 3, 16 / 3], [4, 4, 4]]


@pytest.mark.parametrize(
  ('quantizer', 'grids', 'prefixes'),
  [
    ('vq', [GRID], [None]),
    ('residual', [GRID, GRID], [1, 2]),
    ('multiscale', SCALES, [1, 10, 26]),
    pytest.param('product', [GRID, GRID], [None], marks=pytest.mark.slow),
  ],
)
def test_the_page_shows_the_ids_of_each_level_and_reconstructions(
  make_data, images, quantizer, grids, prefixes
):
  tokenizer, data = make_data(quantizer)
  shown = data['images'][0]
  image = picture(shown['original'])
  if tokenizer.any_size:
    np.testing.assert_array_equal(image, images[0][1])
  ids = np.asarray(tokenizer.encode(image[None]))
  assert shown['grids'] == grids
  flat = ids.reshape(24, -1).T if tokenizer.any_size else ids[0]
  assert sum(shown['ids'], []) == flat.ravel().tolist()
  pictures = map(picture, shown['reconstructions'])
  for made, end in zip(pictures, prefixes, strict=True):
    decoded = np.asarray(to_uint8(tokenizer.decode(ids[..., :end])))[0]
    np.testing.assert_array_equal(made, decoded)


def test_all_scales_share_a_sheet_of_whole_images(make_data):
  tokenizer, data = make_data('multiscale')
  about = {'sides': (1, 3, 4), 'nested': True, 'levels': 3}
  assert data['model'] | about == data['model']
  (codes,) = data['codes']
  used = {str(i) for x in data['images'] for level in x['ids'] for i in level}
  assert set(codes['neighbors']) == used <= set(codes['swatches'])
  code, (x, y) = list(codes['swatches'].items())[-1]
  alone = to_uint8(tokenizer.decode(np.full((128, 1), int(code))))[0]
  swatch = picture(codes['sheet'])[y : y + 16, x : x + 16]
  np.testing.assert_array_equal(swatch, alone)


@pytest.mark.parametrize('quantizer', ['vq', 'residual', 'multiscale'])
def test_neighbors_are_the_nearest_codes(make_data, quantizer):
  tokenizer, data = make_data(quantizer)
  stored = tokenizer.variables['codebook']['vq']
  for level, codes in enumerate(data['codes']):
    book = np.asarray(stored.get(f'level_{level}', stored)['embedding'])
    for code, pairs in codes['neighbors'].items():
      distances = np.linalg.norm(book - book[int(code)], axis=1)
      order = [i for i in np.argsort(distances) if i != int(code)][:8]
      near, got = zip(*pairs, strict=True)
      assert list(near) == order
      np.testing.assert_allclose(got, distances[order], atol=2e-3)


def test_a_swatch_is_the_middle_of_a_grid_of_its_code(make_data):
  tokenizer, data = make_data('vq')
  codes = data['codes'][0]
  code, (x, y) = list(codes['swatches'].items())[-1]
  made = to_uint8(tokenizer.decode(np.full((128, 3, 3), int(code))))
  expected = Image.fromarray(np.asarray(made)[0, 4:8, 4:8]).resize((16, 16))
  got = picture(codes['sheet'])[y : y + 16, x : x + 16]
  np.testing.assert_allclose(got, np.asarray(expected).astype(int), atol=1)


def test_large_images_are_shrunk():
  small = content.shrink(np.zeros((900, 300, 3), np.uint8))
  assert small.shape == (512, 171, 3)


@pytest.fixture
def numbered(tmp_path):
  """A folder of ten images in gray levels of their own; 3, 4, 9 are damaged."""
  (tmp_path / 'in').mkdir()
  for i in range(10):
    path = tmp_path / 'in' / f'{i}.png'
    Image.new('RGB', (8, 12), (20 * i,) * 3).save(path)
    if i in (3, 4, 9):
      path.write_bytes(b'no image')
  return tmp_path / 'in'


@pytest.mark.parametrize('count', [5, 7, 12])
def test_images_that_cannot_be_decoded_are_replaced(
  make_tokenizer, numbered, caplog, count
):
  images = page.example_images(make_tokenizer(), count, source=str(numbered))
  names = [name for name, _ in images]
  assert len(set(names)) == len(names) == min(count, 7)
  for name, image in images:
    assert image.shape == (12, 8, 3) and image[0, 0, 0] == 20 * int(name[0])
  assert all(x.startswith('skipped ') for x in caplog.messages)


def test_only_images_for_multi_scale_tokens_are_cropped(
  make_tokenizer, numbered
):
  one = str(numbered / '7.png')
  ((name, image),) = page.example_images(make_tokenizer(), 5, source=one)
  assert (name, image.shape) == ('7.png', (12, 8, 3))
  scales = make_tokenizer(quantizer='multiscale')
  for source in (str(numbered), one):
    images = page.example_images(scales, 5, source=source)
    assert {image.shape for _, image in images} == {(16, 16, 3)}


def trained_on(tokenizer, name):
  tokenizer = copy.copy(tokenizer)
  tokenizer.config = tokenizer.config | {'data.name': name}
  return tokenizer


def test_an_undecodable_test_image_of_the_run_is_left_out(
  make_tokenizer, image_folder, tmp_path
):
  shutil.copytree(image_folder, tmp_path / 'images')
  paths = sorted((tmp_path / 'images' / 'test').rglob('*.png'))
  paths[0].write_bytes(b'no image')
  tokenizer = trained_on(make_tokenizer(), f'folder:{tmp_path / "images"}')
  images = page.example_images(tokenizer, 11)
  names = {str(path.relative_to(tmp_path / 'images')) for path in paths[1:]}
  assert {name for name, _ in images} == names
  assert all(image.shape == (16, 16, 3) for _, image in images)


def test_where_nothing_can_be_shown_there_is_one_line(make_tokenizer, numbered):
  for path in numbered.iterdir():
    path.write_bytes(b'no image')
  tokenizer = trained_on(make_tokenizer(), 'folder:/no/such/folder')
  for source, message in (
    (str(numbered), 'none of 10 images can be decoded'),
    (str(numbered / '3.png'), '3.png'),
    (None, 'or name images by --input'),
  ):
    with one_line(message):
      page.example_images(tokenizer, 5, source=source)


def test_the_page_loads_nothing_and_escapes_names(make_data):
  text = page.page_html(make_data('vq')[1])
  parser, tags, named = html.parser.HTMLParser(), [], set()
  parser.handle_starttag = lambda tag, attributes: (
    tags.append(tag),
    named.update(name for name, _ in attributes),
  )
  parser.feed(text)
  assert not named & {'src', 'href'} and 'b' not in tags
  assert tags.count('script') == 2
  assert 'http://' not in text and 'https://' not in text
  assert '/*data*/' not in text and '/*script*/' not in text


def test_only_a_page_of_the_explorer_is_replaced(make_data, tmp_path):
  data = make_data('vq')[1]
  path = tmp_path / 'page.html'
  for name in ('first', 'second'):
    page.write_page(path, data | {'model': data['model'] | {'name': name}})
    assert f'"name": "{name}"' in path.read_text()
  path.write_text('<!doctype html><p>mine')
  for output in (path, tmp_path):
    with one_line('not a page of the explorer'):
      page.write_page(output, data)
  assert path.read_text() == '<!doctype html><p>mine'
