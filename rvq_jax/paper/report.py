"""The report on a grid of runs: Markdown tables, JSON and figures."""

import datetime
import html
import json
import logging
import statistics
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from rvq_jax.data import datasets, loaders
from rvq_jax.data.sources import KINDS
from rvq_jax.data.splits import seeded_permutation
from rvq_jax.evaluation import figures
from rvq_jax.evaluation.machine import hardware
from rvq_jax.io import write_atomic
from rvq_jax.paper.ablation import CELLS, PAPER_TABLES, TABLES, TITLES
from rvq_jax.paper.rate_distortion import codec_points, gaussian_bound
from rvq_jax.training.writers import read_jsonl

PAPER_EPOCHS = 300
CODEC_IMAGES = 256
CURVE_PIXELS = 20_000 * 32**2  # of the training split, for the covariance
_COLUMNS = {  # title, format, factor, text beside pictures
  'mse': ('MSE', ',.4f', 1, ''),
  'usage': ('usage, %', ',.1f', 100, ''),
  'perplexity': ('perplexity', ',.1f', 1, ''),
  'psnr': ('PSNR, dB', ',.2f', 1, '{:.2f} dB'),
  'lpips': ('LPIPS, AlexNet', ',.4f', 1, 'LPIPS {:.3f}'),
  'lpips_vgg': ('LPIPS, VGG16', ',.4f', 1, ''),
}
_FRECHET = ('Frechet distance, EfficientNet', ',.1f', 1, 'Frechet {:.0f}')
_COLUMNS['fd_efficientnet_lite0'] = _FRECHET
_PAPER_DATA = {'tfds:cifar10': 'cifar10', 'tfds:imagenet2012': 'imagenet'}
_LEGEND = (
  'MSE on [-1, 1]; usage and perplexity (higher is more even) over the whole '
  'test split; ± is the sample standard deviation over the seeds. In '
  "parentheses: the paper's number and, on the paper's data sets, ours minus "
  'it. On other data the number is that for CIFAR-10.'
)


def versions(*packages: str) -> str:
  """The versions of packages, as 'jax 0.10.2, flax 0.12.6'."""
  return ', '.join(f'{name} {version(name)}' for name in packages)


def write_report(config, workdir, records, *, tables, command: str) -> str:
  """Writes report.md (returned), figures and tables.json to WORKDIR/report.

  `run_grid` with the same config and workdir gave the records; tables are keys
  of `TABLES`; command is the program's command line.
  """
  folder = Path(workdir) / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  summary = summarise(records)
  about = {'command': command} | _about(config, records, tables)
  about['Gaussian curve'], rates = _rate_distortion(config, summary, records)
  drawings = _figures(records) | {'rate_distortion': rates}
  for name, figure in drawings.items():
    figure.savefig(folder / f'{name}.png', dpi=140)
  rows = {n: table_rows(n, summary, config.data.name) for n in tables}
  content = {'about': about, 'summary': summary, 'runs': records}
  write_atomic(folder / 'tables.json', json.dumps(content, indent=2) + '\n')
  text = markdown(about, rows, drawings)
  write_atomic(folder / 'report.md', text)
  return text


def _about(config, records, tables) -> dict[str, str]:
  """The lines above the tables: runs, data, machine."""
  first, data, steps = records[0]['metrics'], config.data, config.num_steps
  length = f'{steps} steps' if steps else f'{config.num_epochs} epochs'
  missing = [str(n) for n in PAPER_TABLES if n not in tables]
  packages = versions('jax', 'flax', 'optax')
  about = {
    'data': f'{data.name}, split {data.split}; measured on '
    f'{first["images"]:,} test images of {data.image_size} x {data.image_size}',
    'each run': f'{length} of batch {config.batch_size}, K = '
    f'{config.model.codebook_size:,}, {first["bits_per_image"]:g} bits each',
    'seeds': str(1 + max(record['seed'] for record in records)),
    'measured': f'{datetime.date.today()}, {hardware()}, {packages}',
    'tables of the paper not run': ', '.join(missing) or 'none',
  }
  if data.name not in _PAPER_DATA or steps or config.num_epochs < PAPER_EPOCHS:
    about["the paper's numbers"] = (
      f'after {PAPER_EPOCHS} epochs of batch 128 on CIFAR-10 or ImageNet: not '
      f'comparable with these runs of {length} on {data.name}'
    )
  for record in records:
    log = read_jsonl(Path(record['workdir']) / 'metrics.jsonl')
    lines = [line for line in log if line.get('train/adversarial_ramp')]
    if lines:
      gap = [r['train/logits_real'] - r['train/logits_fake'] for r in lines]
      loss = [r['train/discriminator_loss'] for r in lines]
      gap, loss = (f'{min(x):.2f} to {max(x):.2f}' for x in (gap, loss))
      text = f'loss {loss}, logits of real minus generated {gap}'
      text = f'in the logged steps in which its loss counts: {text}'
      about[f'discriminator, seed {record["seed"]}'] = text
  return about


def _rate_distortion(config, summary, records):
  """The Gaussian curve in words; a figure with the codecs and the methods."""
  logging.info('rate-distortion curve of the training split')
  data, size = config.data, config.data.image_size
  file = Path(records[0]['workdir']) / datasets.SPLIT_FILE
  dataset = datasets.open_dataset(
    data.name, split=data.split, data_dir=data.data_dir, split_file=file
  )
  limit = max(1000, CURVE_PIXELS // size**2)  # minutes, not hours

  def batches(source, count):
    if dataset.name.startswith(KINDS):  # perhaps in the order of the classes
      drawn = seeded_permutation(len(source), 0)[:count]
      source = source.subset(np.sort(drawn))
    sizes = {'batch_size': CODEC_IMAGES, 'image_size': size}
    return loaders.eval_batches(source, **sizes)

  train, test = (
    batches(dataset.train, limit),
    batches(dataset.test, CODEC_IMAGES),
  )
  bound = gaussian_bound(train, image_size=size, max_images=limit)
  batch, methods = next(test), list(summary.values())
  codecs = codec_points(batch['image'][batch['mask']])
  low = max(1, min(row['entropy_bits'] for row in methods) / 4)
  bits = np.geomspace(low, max(c['bits_per_image'] for c in codecs), 60)
  rate, patch = methods[0]['bits'], bound.patch
  words = f'MSE {float(bound.mse([rate])[0]):.4f} at {rate:g} bits, from the '
  words += (
    f'covariance of {bound.images:,} images in tiles of {patch} x {patch}'
  )
  return words, figures.rate_figure((bits, bound.mse(bits)), codecs, methods)


def _figures(records):
  """The figures of the runs: curves of all seeds, the others of seed 0."""
  samples, counts, logs, notes = {}, {}, {}, {}
  for record in records:
    label, folder = CELLS[record['cell']][0], Path(record['workdir'])
    logs.setdefault(label, []).append(read_jsonl(folder / 'metrics.jsonl'))
    if record['seed'] == 0:
      test, measured = folder / 'evaluation' / 'test', record['metrics']
      counts[label] = np.load(test / 'code_counts.npy', allow_pickle=False)
      strip = np.asarray(Image.open(test / 'samples.png'))
      side = len(strip) // 2
      strip = strip.reshape(2, side, -1, side, 3).swapaxes(1, 2)
      originals, samples[label] = strip
      notes[label] = [
        text.format(measured[name])
        for name, (*_, text) in _COLUMNS.items()
        if text and name in measured
      ]
  # Error maps mislead for perceptual training: leave them out.
  errors = 'lpips' not in records[0]['metrics']
  pictures = figures.reconstructions(originals, samples, notes, errors=errors)
  usage, curves = figures.code_usage(counts), figures.curves(logs)
  return {'reconstructions': pictures, 'code_usage': usage, 'curves': curves}


def summarise(records) -> dict[str, dict]:
  """Cell -> {'label', 'bits', 'entropy_bits' (both per image), and metrics}.

  A table's metric is {'mean', 'std' (of the sample; None for one seed)}.
  """
  summary, by_cell = {}, {}
  for record in records:
    by_cell.setdefault(record['cell'], []).append(record['metrics'])
  for cell, runs in by_cell.items():
    entropy = [m['tokens'] / m['images'] * m['entropy_bits'] for m in runs]
    row = {'label': CELLS[cell][0], 'bits': runs[0]['bits_per_image']}
    row['entropy_bits'] = statistics.mean(entropy)
    for name in [name for name in _COLUMNS if name in runs[0]]:
      values = [m[name] for m in runs]
      std = statistics.stdev(values) if len(values) > 1 else None
      row[name] = {'mean': statistics.mean(values), 'std': std}
    summary[cell] = row
  return summary


def table_rows(table, summary, data: str) -> list[list[str]]:
  """A table of `TABLES` as text, its header first, for data of this name.

  `_LEGEND` explains it; it has only metrics that all methods have.
  """
  methods = TABLES[table]
  shown = [m for m in _COLUMNS if all(m in summary[cell] for cell in methods)]
  rows = [['method', *(_COLUMNS[metric][0] for metric in shown)]]
  for cell, printed in methods.items():
    numbers = printed.get(_PAPER_DATA.get(data, 'cifar10'), ())
    paper = dict(zip(_COLUMNS, numbers, strict=False))
    row = [summary[cell]['label']]
    for metric in shown:
      _, style, factor, _ = _COLUMNS[metric]
      mean, std = (summary[cell][metric][name] for name in ('mean', 'std'))
      text = f'{factor * mean:{style}}'
      if std is not None:
        text += f' ± {factor * std:{style}}'
      if metric in paper:
        gap = f', {factor * (mean - paper[metric]):+{style}}'
        gap = gap if data in _PAPER_DATA else ''
        text += f' (paper {factor * paper[metric]:{style}}{gap})'
      row.append(text)
    rows.append(row)
  return rows


def markdown(about, tables, drawings=()) -> str:
  """The report of {name: text}, {key: `table_rows`} and names of PNG files."""
  lines = ["# The paper's tables, measured", '']
  for name, text in about.items():
    lines.append(f'- {name}: {html.escape(text, quote=False)}')
  lines += ['', _LEGEND]
  for table, (header, *rows) in tables.items():
    paper = f'Table {table}: ' if table in PAPER_TABLES else ''
    lines += ['', f'## {paper}{TITLES[table]}', '']
    for row in (header, ['---'] * len(header), *rows):
      lines.append('| ' + ' | '.join(row) + ' |')
  for name in drawings:
    title = name.replace('_', ' ').capitalize()
    lines += ['', f'## {title}', '', f'![{title}]({name}.png)']
  return '\n'.join(lines) + '\n'
