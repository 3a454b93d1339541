"""Tables and the HTML page of `launch/reproduce.py`.

The page is one file: styles, tables and pictures are inside it, and nothing is
loaded from elsewhere.
"""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

from rvq_jax.evaluation.ablation import TABLES

_SHOWN = (
  ('mse', 'MSE'),
  ('usage', 'usage'),
  ('perplexity', 'perplexity'),
  ('psnr', 'PSNR, dB'),
)
_PAPER_DATA = {'tfds:cifar10': 'cifar10', 'tfds:imagenet2012': 'imagenet'}
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd;
  --paper: #fff; --band: #f5f5f2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a0a0a0;
  --line: #3a3a3a; --paper: #161616; --band: #202020; } }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, figcaption { color: var(--soft); font-size: .9rem; }
code, pre { font-size: .85rem; background: var(--band); border-radius: 3px; }
code { padding: .1em .3em; overflow-wrap: anywhere; }
pre { padding: .6rem; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td { vertical-align: top; }
small { color: var(--soft); display: inline-block; }
thead th { color: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
svg, img { width: 100%; min-width: 38rem; height: auto; }
img { background: #fff; }
"""


def _number(metric, value, spread=None, *, sign=False):
  """A value, and its spread, as people read this metric."""
  if value is None:
    return '–'
  digits, scale, unit = {
    'mse': (4, 1, ''),
    'usage': (1, 100, ' %'),
    'perplexity': (1, 1, ''),
    'psnr': (2, 1, ''),
  }[metric]
  text = f'{value * scale:{"+" if sign else ""},.{digits}f}'
  if spread is not None:
    text += f' ± {spread * scale:,.{digits}f}'
  return text + unit


class Entry(NamedTuple):
  """A number of a table as people read it.

  Attributes:
    ours: mean over the seeds, and its standard deviation.
    paper: what the paper prints, or a dash.
    difference: ours less the paper's, or a dash.
  """

  ours: str
  paper: str
  difference: str


def table_rows(number: int, summary, data: str) -> list[tuple[str, list]]:
  """The lines of a table of the paper.

  Args:
    number: of the table, a key of `ablation.TABLES`.
    summary: from `ablation.summarise`.
    data: config.data.name. A difference to the paper is taken only where it
      is the paper's data set; elsewhere the CIFAR-10 figures stand for
      orientation.

  Returns:
    For each method its label and an `Entry` for MSE, usage, perplexity, PSNR.
  """
  own = _PAPER_DATA.get(data)
  lines = []
  for row in TABLES[number].rows:
    cell, entries = summary[row.cell], []
    for metric, _ in _SHOWN:
      paper = row.paper.get(own or 'cifar10', {}).get(metric)
      mean = cell[metric]['mean']
      gap = mean - paper if own and paper is not None else None
      entries.append(
        Entry(
          _number(metric, mean, cell[metric]['std']),
          _number(metric, paper),
          _number(metric, gap, sign=True),
        )
      )
    lines.append((cell['label'], entries))
  return lines


def _paper_data(data):
  """'CIFAR-10' or 'ImageNet': whose figures of the paper stand in a table."""
  names = {'cifar10': 'CIFAR-10', 'imagenet': 'ImageNet'}
  return names[_PAPER_DATA.get(data, 'cifar10')]


def markdown(tables, summary, about) -> str:
  """All tables as Markdown.

  Args:
    tables: numbers of the tables.
    summary: from `ablation.summarise`.
    about: what was run: {name: text}, with 'data' = config.data.name.

  Returns:
    The text.
  """
  lines = [f'- {name}: {text}' for name, text in about.items()]
  header = ['method']
  for _, title in _SHOWN[:-1]:
    header += [title, f'paper ({_paper_data(about["data"])})', 'difference']
  header.append(_SHOWN[-1][1])
  for number in tables:
    table = TABLES[number]
    lines += ['', f'## Table {number}: {table.title}', '', table.note, '']
    lines.append('| ' + ' | '.join(header) + ' |')
    lines.append('|---' * len(header) + '|')
    for label, entries in table_rows(number, summary, about['data']):
      row = [label, *(text for entry in entries[:-1] for text in entry)]
      lines.append('| ' + ' | '.join([*row, entries[-1].ours]) + ' |')
  return '\n'.join(lines) + '\n'


def svg(figure, name: str) -> str:
  """A Matplotlib figure as inline SVG in the colours of the page.

  Args:
    figure: a Matplotlib figure with black text and lines.
    name: makes the ids inside unique among the figures of a page.

  Returns:
    The element <svg>.
  """
  buffer = io.StringIO()
  style = {'svg.fonttype': 'none', 'svg.hashsalt': name}
  with matplotlib.rc_context(style):
    figure.savefig(
      buffer, format='svg', transparent=True, metadata={'Date': None}
    )
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'#000000|#262626|\bblack\b', 'currentColor', text)
  text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', text, count=1)
  # Text without a fill of its own is black, not the colour of the page.
  return text.replace('<svg', '<svg fill="currentColor"', 1)


def png(figure) -> str:
  """A Matplotlib figure as an <img> that holds its PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=110)
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="" src="data:image/png;base64,{data}">'


def _html_entry(entry):
  text = html.escape(entry.ours)
  if entry.paper == '–':
    return text
  text += f'<br><small>paper {html.escape(entry.paper)}'
  if entry.difference != '–':
    text += f',</small> <small>{html.escape(entry.difference)}'
  return text + '</small>'


def page(title: str, about, tables, summary, figures) -> str:
  """The whole report.

  Args:
    title: of the page.
    about: what was run: {name: text}, with 'data' = config.data.name.
    tables: numbers of the tables.
    summary: from `ablation.summarise`.
    figures: [(heading, caption, element)].

  Returns:
    An HTML document.
  """
  out = [
    '<!doctype html>',
    '<html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>',
    f'<h1>{html.escape(title)}</h1>',
  ]
  out.append('<div class="wide"><table><tbody>')
  for name, text in about.items():
    out.append(
      f'<tr><td>{html.escape(name)}</td><td style="text-align:left;'
      f'white-space:normal">{html.escape(str(text))}</td></tr>'
    )
  out.append('</tbody></table></div>')
  for number in tables:
    table = TABLES[number]
    out.append(f'<h2>Table {number}: {html.escape(table.title)}</h2>')
    out.append(f'<p class="note">{html.escape(table.note)}</p>')
    out.append('<div class="wide"><table><thead><tr><th>method</th>')
    out += [f'<th>{html.escape(title)}</th>' for _, title in _SHOWN]
    out.append('</tr></thead><tbody>')
    for label, entries in table_rows(number, summary, about['data']):
      cells = ''.join(f'<td>{_html_entry(entry)}</td>' for entry in entries)
      out.append(f'<tr><td>{html.escape(label)}</td>{cells}</tr>')
    out.append('</tbody></table></div>')
    out.append(
      '<p class="note">Beneath each number: what the paper prints for '
      f'{_paper_data(about["data"])}, and ours less that (only on the same '
      'data set).</p>'
    )
  for heading, caption, element in figures:
    out.append(f'<h2>{html.escape(heading)}</h2><figure>{element}')
    out.append(f'<figcaption>{html.escape(caption)}</figcaption></figure>')
  out.append('</body></html>')
  return '\n'.join(out) + '\n'


def write(folder, *, title, about, tables, summary, records, figures) -> None:
  """Writes tables.md, tables.json, report.html and the figures as PNG.

  Args:
    folder: directory to write to.
    title: of the page.
    about: what was run: {name: text}, with 'data' = config.data.name.
    tables: numbers of the tables.
    summary: from `ablation.summarise`.
    records: from `ablation.run_grid`.
    figures: [(name, heading, caption, Matplotlib figure, is a picture)].
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tables.md').write_text(markdown(tables, summary, about))
  report = {'about': about, 'summary': summary, 'runs': records}
  (folder / 'tables.json').write_text(json.dumps(report, indent=2) + '\n')
  elements = []
  for name, heading, caption, figure, picture in figures:
    figure.savefig(folder / f'{name}.png', dpi=140)
    element = png(figure) if picture else svg(figure, name)
    elements.append((heading, caption, element))
  text = page(title, about, tables, summary, elements)
  part = folder / 'report.html.part'
  part.write_text(text, encoding='utf-8')
  part.replace(folder / 'report.html')
