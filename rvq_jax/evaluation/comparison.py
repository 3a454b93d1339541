"""Figures that set methods side by side (paper 4.4)."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rvq_jax.evaluation.figures import series
from rvq_jax.training.writers import read_jsonl

ERROR_GAIN = 4  # error maps show this multiple of |difference|
_COLOURS = (
  *('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e'),
  *('#8c564b', '#17a2b8', '#e377c2', '#7f7f7f', '#a6a61c'),
)


def colours(cells) -> dict[str, str]:
  """A colour for each cell, the same in every figure."""
  return {cell: _COLOURS[i % len(_COLOURS)] for i, cell in enumerate(cells)}


def _by_cell(records):
  groups = {}
  for record in records:
    groups.setdefault(record['cell'], []).append(record)
  return groups


def curves(records, labels, name: str, title: str, *, log=False) -> Figure:
  """A training metric over the steps: mean over seeds, band from least to most.

  Args:
    records: from `ablation.run_grid`.
    labels: cell -> name in the legend.
    name: of the metric in metrics.jsonl, as 'train/mse'.
    title: of the vertical axis.
    log: logarithmic vertical axis.

  Returns:
    The figure.
  """
  figure = Figure(figsize=(8, 4.2), layout='constrained')
  ax = figure.subplots()
  palette = colours(labels)
  for cell, group in _by_cell(records).items():
    logs = [Path(record['workdir']) / 'metrics.jsonl' for record in group]
    runs = [series(read_jsonl(log), name) for log in logs]
    runs = [run for run in runs if len(run[0])]
    if not runs:
      continue
    steps = runs[0][0]
    values = np.stack([np.interp(steps, *run) for run in runs])
    ax.plot(
      steps, values.mean(0), color=palette[cell], lw=1.6, label=labels[cell]
    )
    ax.fill_between(
      steps, values.min(0), values.max(0), color=palette[cell], alpha=0.2, lw=0
    )
  ax.set(xlabel='step', ylabel=title, yscale='log' if log else 'linear')
  ax.grid(alpha=0.25)
  figure.legend(loc='outside right upper', frameon=False, fontsize=8)
  return figure


def usage(records, labels) -> Figure:
  """How often each method uses its codes, the most used first (one seed).

  Args:
    records: from `ablation.run_grid`; those of seed 0 are drawn.
    labels: cell -> name in the legend.

  Returns:
    The figure: frequency as a multiple of 1/K against rank/K. A method that
    used all codes alike would be the horizontal line at 1.
  """
  figure = Figure(figsize=(8, 4.2), layout='constrained')
  ax = figure.subplots()
  palette = colours(labels)
  for record in records:
    if record['seed']:
      continue
    path = Path(record['workdir']) / 'evaluation' / 'test' / 'code_counts.npy'
    counts = np.sort(np.load(path, allow_pickle=False), axis=None)[::-1]
    share = counts / max(counts.sum(), 1) * counts.size
    rank = np.arange(1, counts.size + 1) / counts.size
    used = share > 0
    cell = record['cell']
    ax.plot(
      rank[used], share[used], color=palette[cell], lw=1.6, label=labels[cell]
    )
  ax.axhline(1, color='#888888', lw=1, ls='--')
  ax.set(
    xlabel='codes, the most used first, as a share of K',
    ylabel='times chosen, 1 = all codes alike',
    yscale='log',
    xlim=(0, 1),
  )
  ax.grid(alpha=0.25)
  figure.legend(loc='outside right upper', frameon=False, fontsize=8)
  return figure


def reconstructions(records, labels) -> Figure:
  """Originals, and of each method reconstruction and error map (one seed).

  Args:
    records: from `ablation.run_grid`; those of seed 0 are drawn.
    labels: cell -> name beside its row.

  Returns:
    The figure. An error map is `ERROR_GAIN` times the absolute difference,
    mean over the channels; black is none.
  """
  shown = [record for record in records if not record['seed']]
  strips = []
  for record in shown:
    path = Path(record['workdir']) / 'evaluation' / 'test' / 'samples.png'
    with Image.open(path) as image:
      strips.append(np.asarray(image.convert('RGB')))
  height = strips[0].shape[0] // 2
  wide = strips[0].shape[1] / height
  rows = 1 + 2 * len(shown)
  figure = Figure(figsize=(wide * 0.85 + 2.2, 0.88 * rows), layout='compressed')
  axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
  pictures = [('original', strips[0][:height])]
  for record, strip in zip(shown, strips, strict=True):
    original, made = strip[:height], strip[height:]
    error = np.abs(made.astype(np.float32) - original).mean(-1)
    error = np.clip(ERROR_GAIN * error, 0, 255).astype(np.uint8)
    pictures.append((labels[record['cell']], made))
    pictures.append((f'error x {ERROR_GAIN}', error))
  for ax, (label, picture) in zip(axes, pictures, strict=True):
    ax.imshow(picture, cmap='inferno', vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(
      label, rotation=0, ha='right', va='center', fontsize=8, wrap=True
    )
  return figure
