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

import matplotlib

from rvq_jax.evaluation.ablation import TABLES

_SHOWN = (('mse', 'MSE'), ('usage', 'usage'), ('perplexity', 'perplexity'))
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
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; } svg, img { max-width: 100%; height: auto; }
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


def table_rows(number: int, summary, data: str) -> tuple[list, list]:
  """Header and lines of a table of the paper.

  Args:
    number: of the table, a key of `ablation.TABLES`.
    summary: from `ablation.summarise`.
    data: config.data.name. A difference to the paper is taken only where it
      is the paper's data set; elsewhere the CIFAR-10 figures stand for
      orientation.

  Returns:
    The header [str] and the lines [[str]].
  """
  own = _PAPER_DATA.get(data)
  printed = own or 'cifar10'
  names = {'cifar10': 'CIFAR-10', 'imagenet': 'ImageNet'}
  header = ['method']
  for _, title in _SHOWN:
    header += [title, f'paper ({names[printed]})', 'difference']
  header += ['PSNR, dB', 'seeds']
  lines = []
  for row in TABLES[number].rows:
    cell = summary[row.cell]
    line = [cell['label']]
    for metric, _ in _SHOWN:
      paper = row.paper.get(printed, {}).get(metric)
      mean = cell[metric]['mean']
      gap = mean - paper if own and paper is not None else None
      line += [
        _number(metric, mean, cell[metric]['std']),
        _number(metric, paper),
        _number(metric, gap, sign=True),
      ]
    line += [
      _number('psnr', cell['psnr']['mean'], cell['psnr']['std']),
      str(cell['seeds']),
    ]
    lines.append(line)
  return header, lines


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
  for number in tables:
    header, rows = table_rows(number, summary, about['data'])
    table = TABLES[number]
    lines += ['', f'## Table {number}: {table.title}', '', table.note, '']
    lines.append('| ' + ' | '.join(header) + ' |')
    lines.append('|---' * len(header) + '|')
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
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
    header, rows = table_rows(number, summary, about['data'])
    out.append(f'<h2>Table {number}: {html.escape(table.title)}</h2>')
    out.append(f'<p class="note">{html.escape(table.note)}</p>')
    out.append('<div class="wide"><table><thead><tr>')
    out += [f'<th>{html.escape(x)}</th>' for x in header]
    out.append('</tr></thead><tbody>')
    for row in rows:
      cells = ''.join(f'<td>{html.escape(x)}</td>' for x in row)
      out.append(f'<tr>{cells}</tr>')
    out.append('</tbody></table></div>')
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
