"""Tables and page: the numbers they show, and that they stand alone."""

import re

import pytest
from matplotlib.figure import Figure

from rvq_jax.evaluation import ablation, report


@pytest.fixture
def summary():
  def row(label, mse):
    numbers = {'mse': mse, 'psnr': 20.0, 'usage': 0.9, 'perplexity': 1234.5}
    return {'label': label, 'seeds': 2, 'seconds': 60.0} | {
      name: {'mean': value, 'std': 0.1 * value, 'values': [value]}
      for name, value in numbers.items()
    }

  return {
    name: row(cell.label, 0.02 + 0.01 * i)
    for i, (name, cell) in enumerate(ablation.CELLS.items())
  }


def test_a_table_shows_ours_the_papers_and_the_difference(summary):
  lines = report.table_rows(3, summary, 'tfds:cifar10')
  label, (mse, usage, perplexity, psnr) = lines[0]
  assert label == 'rotation, EMA'
  assert mse == ('0.0200 ± 0.0020', '0.0098', '+0.0102')
  assert usage == ('90.0 ± 9.0 %', '96.8 %', '-6.8 %')
  assert perplexity == ('1,234.5 ± 123.5', '7,950.4', '-6,715.9')
  assert psnr == ('20.00 ± 2.00', '–', '–')
  assert lines[2][1][0][1:] == ('–', '–')  # not in the paper


def test_other_data_get_no_difference(summary):
  _, (mse, *_) = report.table_rows(4, summary, 'photos')[0]
  assert mse[1:] == ('0.0123', '–')


def test_imagenet_is_compared_with_the_papers_imagenet(summary):
  _, (mse, *_) = report.table_rows(3, summary, 'tfds:imagenet2012')[0]
  assert mse == ('0.0200 ± 0.0020', '0.0275', '-0.0075')


def test_markdown_has_as_many_columns_in_each_line(summary):
  text = report.markdown([3, 4], summary, {'data': 'photos'})
  widths = {
    line.count('|') for line in text.splitlines() if line.startswith('|')
  }
  assert len(widths) == 1
  assert '## Table 4: Rotation on and off' in text
  assert 'paper (CIFAR-10)' in text


def test_the_page_loads_nothing_and_escapes_what_it_is_given(summary):
  figure = Figure()
  figure.subplots().plot([0, 1], [0, 1], label='line')
  elements = [
    ('A', 'b', report.svg(figure, 'a')),
    ('P', 'q', report.png(figure)),
  ]
  about = {'data': 'photos', 'command': '--x=<script>'}
  text = report.page('title', about, [3], summary, elements)
  assert not re.search(r'(src|href)="(?!data:|#)', text)
  assert '<script' not in text and '@import' not in text
  assert 'prefers-color-scheme: dark' in text
  assert 'name="viewport"' in text


def test_figures_take_the_colour_of_the_page():
  figure = Figure()
  figure.subplots().plot([0, 1], [0, 1], color='#1f77b4')
  text = report.svg(figure, 'a')
  assert '#000000' not in text and 'currentColor' in text
  assert '#1f77b4' in text
