"""The report of `launch/reproduce.py`: tables, figures, one HTML page."""

import base64
import datetime
import html
import json
import logging
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax.data import datasets, loaders
from rvq_jax.data.splits import seeded_permutation
from rvq_jax.evaluation import figures
from rvq_jax.io import write_atomic
from rvq_jax.paper import rate_distortion
from rvq_jax.paper.ablation import (
  CELLS,
  METRICS,
  PAPER_TABLES,
  TABLES,
  TITLES,
  summarise,
)
from rvq_jax.training.writers import read_jsonl

CODEC_IMAGES = 256
CURVE_PIXELS = 20_000 * 32**2  # of the training split, for the covariance
_FORMATS = {  # title, digits, factor, unit
  'mse': ('MSE', 4, 1, ''),
  'usage': ('usage', 1, 100, ' %'),
  'perplexity': ('perplexity', 1, 1, ''),
  'psnr': ('PSNR, dB', 2, 1, ''),
  'lpips': ('LPIPS, AlexNet', 4, 1, ''),
  'lpips_vgg': ('LPIPS, VGG16', 4, 1, ''),
  'fd_efficientnet_lite0': ('Frechet distance, EfficientNet', 1, 1, ''),
}
_NOTES = {  # beside pictures
  'psnr': '{:.2f} dB',
  'lpips': 'LPIPS {:.3f}',
  'fd_efficientnet_lite0': 'Frechet {:.0f}',
}
_PAPER_DATA = {'tfds:cifar10': 'cifar10', 'tfds:imagenet2012': 'imagenet'}
_LEGEND = (
  'MSE on [-1, 1]; usage and perplexity (higher is more even) over the whole '
  'test split; ± is the sample standard deviation over the seeds. In '
  'parentheses: what the paper prints (for CIFAR-10, if the data is neither of '
  'its sets), and on its own data sets ours less that.'
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The paper's tables</title><style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
div { overflow-x: auto; } small, p { opacity: .7; font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .3rem .7rem; border-bottom: 1px solid #8884; }
img { width: 100%; min-width: 38rem; background: #fff; }
</style></head><body><h1>The paper's tables, measured</h1>
"""


def hardware() -> str:
  """Devices and processor, as '1 x cpu, 2 cores of AMD EPYC'."""
  info, devices = Path('/proc/cpuinfo'), jax.devices()
  lines = info.read_text() if info.exists() else ''
  names = re.findall('model name.*: (.*)', lines) or [platform.machine()]
  cpu = f'{os.cpu_count()} cores of {names[0]}'
  return f'{len(devices)} x {devices[0].device_kind}, {cpu}'


def versions(*packages: str) -> str:
  """'jax 0.10.2, flax 0.12.6' of the packages named."""
  return ', '.join(f'{name} {version(name)}' for name in packages)


def write_report(config, workdir, records, *, tables, command: str) -> str:
  """Writes WORKDIR/report: report.html, tables.md, tables.json, figures.

  Args:
    config: ConfigDict that all methods share.
    workdir: directory of the grid.
    records: from `ablation.run_grid`.
    tables: keys of `TABLES`.
    command: how the program was called.

  Returns:
    The tables as Markdown.
  """
  folder = Path(workdir) / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  summary = summarise(records)
  curve, rates = _rate_distortion(config, summary, records)
  about = _about(config, command, records) | {'Gaussian curve': curve}
  drawn = _figures(records) | {'rate_distortion': rates}
  for name, figure in drawn.items():
    figure.savefig(folder / f'{name}.png', dpi=140)
  pictures = {name: (folder / f'{name}.png').read_bytes() for name in drawn}
  rows = {n: table_rows(n, summary, config.data.name) for n in tables}
  content = {'about': about, 'summary': summary, 'runs': records}
  write_atomic(folder / 'tables.json', json.dumps(content, indent=2) + '\n')
  write_atomic(folder / 'tables.md', markdown(about, rows))
  write_atomic(folder / 'report.html', page(about, rows, pictures))
  return markdown(about, rows)


def _about(config, command, records):
  """What stands above the tables."""
  first, size = records[0]['metrics'], config.data.image_size
  length = f'{config.num_steps or config.num_epochs} '
  length += 'steps' if config.num_steps else 'epochs'
  about = {
    'command': command,
    'data': f'{config.data.name}, split {config.data.split}; measured on '
    f'{first["images"]:,} test images of {size} x {size}',
    'each run': f'{length} of batch {config.batch_size}, K = '
    f'{config.model.codebook_size:,}, {first["bits_per_image"]:g} bits each',
    'seeds': str(1 + max(record['seed'] for record in records)),
    'measured': f'{datetime.date.today()}, {hardware()}, '
    f'{versions("jax", "flax", "optax")}',
  }
  for record in records:
    log = read_jsonl(Path(record['workdir']) / 'metrics.jsonl')
    judged = [line for line in log if line.get('train/adversarial_ramp')]
    if judged:
      gap = [r['train/logits_real'] - r['train/logits_fake'] for r in judged]
      loss = [r['train/discriminator_loss'] for r in judged]
      about[f'discriminator, seed {record["seed"]}'] = (
        f'while its loss counts, in the lines of the log: loss {min(loss):.2f} '
        f'to {max(loss):.2f}, logits of real less generated {min(gap):.2f} to '
        f'{max(gap):.2f}'
      )
  return about


def drawn(source, count: int):
  """At most `count` images, drawn with a fixed seed.

  Those of a folder are in the order of their classes; other sets are shuffled.
  """
  return source.subset(np.sort(seeded_permutation(len(source), 0)[:count]))


def _rate_distortion(config, summary, records):
  """The Gaussian curve in words; a figure with the codecs and the methods."""
  logging.info('rate-distortion curve of the training split')
  size = config.data.image_size
  dataset = datasets.open_dataset(
    config.data.name,
    split=config.data.split,
    data_dir=config.data.data_dir,
    split_file=Path(records[0]['workdir']) / datasets.SPLIT_FILE,
  )
  limit = max(1000, CURVE_PIXELS // size**2)  # minutes, not hours
  train, test = (
    loaders.eval_batches(
      drawn(source, count) if dataset.name.startswith('folder:') else source,
      batch_size=CODEC_IMAGES,
      image_size=size,
    )
    for source, count in (
      (dataset.train, limit),
      (dataset.test, CODEC_IMAGES),
    )
  )
  bound = rate_distortion.gaussian_bound(
    train, image_size=size, max_images=limit
  )
  batch, methods = next(test), list(summary.values())
  codecs = rate_distortion.codec_points(batch['image'][batch['mask']])
  low = max(1, min(row['entropy_bits'] for row in methods) / 4)
  bits = np.geomspace(low, max(c['bits_per_image'] for c in codecs), 60)
  at = methods[0]['bits']
  words = (
    f'MSE {float(bound.mse([at])[0]):.4f} at {at:g} bits, from the covariance '
    f'of {bound.images:,} images in tiles of {bound.patch} x {bound.patch}'
  )
  return words, figures.rate_figure((bits, bound.mse(bits)), codecs, methods)


def _figures(records):
  """The figures of the runs; of seed 0, except for the curves."""
  samples, counts, logs, notes = {}, {}, {}, {}
  for record in records:
    label = CELLS[record['cell']][0]
    folder = Path(record['workdir'])
    logs.setdefault(label, []).append(read_jsonl(folder / 'metrics.jsonl'))
    if record['seed'] == 0:
      test = folder / 'evaluation' / 'test'
      counts[label] = np.load(test / 'code_counts.npy', allow_pickle=False)
      strip = np.asarray(Image.open(test / 'samples.png'))
      side = len(strip) // 2
      strip = strip.reshape(2, side, -1, side, 3).swapaxes(1, 2)
      originals, samples[label] = strip
      measured = record['metrics']
      notes[label] = [
        text.format(measured[n]) for n, text in _NOTES.items() if n in measured
      ]
  return {
    # An error says less of pictures that are not to have the least.
    'reconstructions': figures.reconstructions(
      originals, samples, notes, errors='lpips' not in records[0]['metrics']
    ),
    'code_usage': figures.code_usage(counts),
    'curves': figures.curves(logs),
  }


def table_rows(table, summary, data: str) -> list[list[str]]:
  """A table as text; see `_LEGEND`.

  Args:
    table: a key of `TABLES`.
    summary: from `ablation.summarise`.
    data: config.data.name.

  Returns:
    The header, and per method its label, MSE, usage, perplexity, PSNR and what
    networks say, where it was measured.
  """
  own = _PAPER_DATA.get(data)
  measured = [summary[cell].keys() for cell in TABLES[table]]
  shown = [m for m in _FORMATS if all(m in names for names in measured)]
  rows = [['method', *(_FORMATS[metric][0] for metric in shown)]]
  for cell, printed in TABLES[table].items():
    row = [summary[cell]['label']]
    paper = dict(zip(METRICS, printed.get(own or 'cifar10', ()), strict=False))
    for metric in shown:
      _, digits, factor, unit = _FORMATS[metric]
      mean, std = (summary[cell][metric][name] for name in ('mean', 'std'))
      text = f'{factor * mean:,.{digits}f}'
      text += '' if std is None else f' ± {factor * std:,.{digits}f}'
      text += unit
      if metric in paper:
        gap = f', {factor * (mean - paper[metric]):+,.{digits}f}{unit}'
        text += f' (paper {factor * paper[metric]:,.{digits}f}{unit}'
        text += (gap if own else '') + ')'
      row.append(text)
    rows.append(row)
  return rows


def markdown(about, tables) -> str:
  """All tables as Markdown; arguments as for `page`."""
  lines = [*(f'- {name}: {text}' for name, text in about.items()), '', _LEGEND]
  for table, (header, *rows) in tables.items():
    lines += ['', f'## {_heading(table)}', '']
    for row in (header, ['---'] * len(header), *rows):
      lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines) + '\n'


def page(about, tables, pictures) -> str:
  """The whole report as one HTML document that loads nothing.

  Args:
    about: what was run: {name: text}.
    tables: key of `TABLES` -> `table_rows`.
    pictures: name -> PNG file as bytes.
  """
  parts = [_html_table(about.items()), f'<p>{_LEGEND}</p>']
  for table, rows in tables.items():
    parts.append(f'<h2>{_heading(table)}</h2>')
    parts.append(_html_table(rows))
  for name, picture in pictures.items():
    data = base64.b64encode(picture).decode()
    parts.append(f'<h2>{name.replace("_", " ").capitalize()}</h2>')
    parts.append(f'<div><img alt="" src="data:image/png;base64,{data}"></div>')
  return _PAGE + '\n'.join(parts) + '</body></html>\n'


def _heading(table) -> str:
  if table in PAPER_TABLES:
    return f'Table {table}: {TITLES[table]}'
  return TITLES[table]


def _html_table(rows) -> str:
  lines = ''
  for row in rows:
    cells = '</td><td>'.join(html.escape(text) for text in row)
    cells = re.sub(r' (\(paper .*?\))', r'<br><small>\1</small>', cells)
    lines += f'<tr><td>{cells}</td></tr>\n'
  return f'<div><table>{lines}</table></div>'
