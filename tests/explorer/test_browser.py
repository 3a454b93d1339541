"""The explorer's page in headless Chromium, with real clicks."""

import shutil

import numpy as np
import pytest

from rvq_jax.explorer import page

sync_api = pytest.importorskip(
  'playwright.sync_api', reason='no playwright: pip install playwright'
)
NAMES = 'chromium', 'chromium-browser', 'chrome'
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason='no chromium on this machine'),
]


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    # In a container Chromium cannot set up a sandbox of its own.
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@pytest.fixture
def open_file(browser, make_data, tmp_path):
  """Returns a function of a quantizer that opens its page."""
  tab, errors = browser.new_page(viewport={'width': 1280, 'height': 1000}), []
  tab.on('pageerror', lambda error: errors.append(str(error)))
  tab.on('console', lambda m: m.type == 'error' and errors.append(m.text))

  def open_it(quantizer='vq'):
    _, data = make_data(quantizer)
    path = tmp_path / 'explore.html'
    page.write_page(path, data)
    tab.goto(path.as_uri())
    tab.wait_for_selector('body[data-ready]')
    return tab, data['images']

  yield open_it
  tab.close()
  assert errors == []


def click_cell(tab, image, row, column, canvas='#tokens'):
  box = tab.locator(canvas).bounding_box()
  x = box['x'] + box['width'] * (column + 0.5) * 4 / image['width']
  y = box['y'] + box['height'] * (row + 0.5) * 4 / image['height']
  tab.mouse.click(x, y)


def pixel(tab, canvas, x, y):
  return tab.evaluate(
    """([id, x, y]) => [...document.getElementById(id).getContext('2d')
    .getImageData(x, y, 1, 1).data].slice(0, 3)""",
    [canvas, x, y],
  )


def test_a_click_shows_the_code_its_neighbors_and_its_uses(open_file):
  tab, images = open_file()
  image = images[0]
  click_cell(tab, image, 2, 5)
  ids = np.reshape(image['ids'][0], (4, 6))
  assert tab.inner_text('#name') == f'code {ids[2, 5]}'
  count = (ids == ids[2, 5]).sum()
  total = sum(i['ids'][0].count(ids[2, 5]) for i in images)
  text = tab.inner_text('#counts')
  assert text.startswith('row 2, column 5; ')
  assert f'{count} times in this image' in text or count == 1
  assert f'{total} times in all 2' in text or total == 1
  assert tab.locator('#neighbors button').count() == 8
  assert tab.locator('#uses button').count() == sum(
    ids[2, 5] in i['ids'][0] for i in images
  )
  # The same cell of another picture is the same token.
  click_cell(tab, image, 1, 1, canvas='#original')
  assert tab.inner_text('#name') == f'code {ids[1, 1]}'
  tab.keyboard.press('ArrowRight')
  assert tab.inner_text('#counts').startswith('row 1, column 2; ')
  neighbor = tab.locator('#neighbors button').first
  code = neighbor.get_attribute('value')
  neighbor.click()
  assert tab.inner_text('#name') == f'code {code}'


def test_pictures_are_drawn_by_pixels_and_others_are_a_click_away(open_file):
  tab, _ = open_file()
  # Twelve black columns, then twelve of (200, 120, 40), 19 times as large.
  assert pixel(tab, 'original', 19 * 11 + 9, 100) == [0, 0, 0]
  assert pixel(tab, 'original', 19 * 12 + 9, 100) == [200, 120, 40]
  error = pixel(tab, 'error', 19 * 12 + 9, 100)
  tab.locator('#gain').fill('16')
  assert sum(pixel(tab, 'error', 19 * 12 + 9, 100)) >= sum(error)
  assert tab.inner_text('#gain-value') == '16'
  tab.locator('#thumbnails button').nth(1).click()
  assert '12 x 20, 3 x 5 tokens' in tab.inner_text('#quality')


def test_the_slider_goes_through_the_depth_of_a_residual(open_file):
  tab, images = open_file('residual')
  psnr = images[0]['psnr']
  assert f'{psnr[1]:.2f} dB' in tab.inner_text('#quality')
  tab.locator('#depth').fill('1')
  assert tab.inner_text('#depth-value') == '1 of 2'
  assert f'{psnr[0]:.2f} dB' in tab.inner_text('#quality')
  click_cell(tab, images[0], 0, 0)
  levels = tab.locator('#levels button')
  assert levels.count() == 2
  levels.nth(1).click()
  assert tab.inner_text('#name') == f'code {images[0]["ids"][1][0]}'


def test_the_slider_goes_through_the_scales(open_file):
  tab, images = open_file('multiscale')
  assert '4 x 4 tokens' in tab.inner_text('#quality')
  tab.locator('#depth').fill('2')
  assert tab.inner_text('#depth-value') == '2 of 3'
  assert '3 x 3 tokens' in tab.inner_text('#quality')
  assert f'{images[0]["psnr"][1]:.2f} dB' in tab.inner_text('#quality')
  box = tab.locator('#tokens').bounding_box()
  tab.mouse.click(box['x'] + 0.9 * box['width'], box['y'] + 5)
  assert tab.inner_text('#name') == f'code {images[0]["ids"][1][2]}'
  assert tab.locator('#levels button').count() == 0


def test_colors_by_use_run_from_rare_to_frequent(open_file):
  tab, images = open_file()
  tab.locator('#colors').select_option('used')
  counts = np.bincount(sum((i['ids'][0] for i in images), []))
  for i, code in enumerate(images[0]['ids'][0]):
    row, column = divmod(i, 6)  # tokens are drawn 19 x 4 pixels per side
    color = pixel(tab, 'tokens', 76 * column + 38, 76 * row + 38)
    lightness = (max(color) + min(color)) / 510
    share = np.log(counts[code]) / np.log(max(2, counts.max()))
    assert abs(lightness - (0.28 + 0.35 * share)) < 0.01
  legend = tab.inner_text('#use-legend').split()
  assert legend == f'used once {counts.max()} times'.split()
  tab.locator('#colors').select_option('random')
  assert tab.locator('#use-legend').is_hidden()


def test_the_scale_of_the_error_follows_its_gain(open_file):
  tab, _ = open_file()
  assert tab.inner_text('#error-most') == '64 of 255'
  tab.locator('#gain').fill('8')
  assert tab.inner_text('#error-most') == '32 of 255'
  gradient = (
    "getComputedStyle(document.getElementById('error-scale')).background"
  )
  assert 'rgb(252, 253, 191)' in tab.evaluate(gradient)
