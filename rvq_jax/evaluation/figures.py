"""Figures of a run: reconstructions, code usage, curves (paper 4.4)."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rvq_jax.training.writers import read_jsonl

_BLUE, _ORANGE, _GREY = '#1f5fa8', '#d2691e', '#888888'


def save_reconstructions(path, originals, reconstructions, psnr) -> None:
  """Originals above reconstructions, the PSNR of each beneath.

  Args:
    path: PNG file to write.
    originals: uint8 [n, h, w, 3].
    reconstructions: uint8 [n, h, w, 3].
    psnr: dB, [n].
  """
  n = len(originals)
  figure = Figure(figsize=(1.25 * n, 2.9), layout='constrained')
  axes = figure.subplots(2, n, squeeze=False)
  for column in range(n):
    for row, images in enumerate((originals, reconstructions)):
      ax = axes[row, column]
      ax.imshow(images[column], interpolation='nearest')
      ax.set(xticks=[], yticks=[])
      ax.spines[:].set_visible(False)
    axes[1, column].set_xlabel(f'{psnr[column]:.1f} dB', fontsize=9)
  axes[0, 0].set_ylabel('original', fontsize=9)
  axes[1, 0].set_ylabel('reconstruction', fontsize=9)
  figure.savefig(path, dpi=160)


def save_code_usage(path, counts) -> None:
  """Codes by how often they are used, most used first.

  Args:
    path: PNG file to write.
    counts: how often each code was chosen, [K].
  """
  counts = np.sort(np.asarray(counts, np.float64), axis=None)[::-1]
  used = int((counts > 0).sum())
  mean = counts.sum() / counts.size
  figure = Figure(figsize=(6, 3.4), layout='constrained')
  ax = figure.subplots()
  ax.plot(np.arange(1, used + 1), counts[:used], color=_BLUE)
  ax.axhline(mean, color=_GREY, linestyle='--', linewidth=1)
  ax.annotate(
    f'all codes alike: {mean:.1f}',
    (counts.size, mean),
    ha='right',
    va='bottom',
    fontsize=9,
    color=_GREY,
  )
  ax.set(
    xlabel='codes, most used first',
    ylabel='times chosen',
    yscale='log',
    xlim=(0, counts.size),
    title=f'{used:,} of {counts.size:,} codes used ({used / counts.size:.1%})',
  )
  ax.grid(alpha=0.25)
  figure.savefig(path, dpi=160)


def series(records, name: str) -> list[tuple]:
  """Steps and values of a metric in the lines of metrics.jsonl, [2]."""
  points = [(r['step'], r[name]) for r in records if r.get(name) is not None]
  return list(zip(*points, strict=True)) or [(), ()]


def save_curves(path, workdir) -> None:
  """Loss, PSNR, usage and perplexity over the steps of a run.

  Args:
    path: PNG file to write.
    workdir: directory of the run, with its metrics.jsonl.
  """
  records = read_jsonl(Path(workdir) / 'metrics.jsonl')
  panels = (
    ('mse', 'MSE on [-1, 1]', ('train/mse', 'validation/mse')),
    ('psnr', 'PSNR, dB', ('validation/psnr',)),
    ('usage', 'codes used', ('train/usage', 'validation/usage')),
    (
      'perplexity',
      'perplexity',
      ('train/perplexity', 'validation/perplexity'),
    ),
  )
  colours = {'train': _ORANGE, 'validation': _BLUE}
  figure = Figure(figsize=(9, 5.6), layout='constrained')
  for ax, (name, label, curves) in zip(
    figure.subplots(2, 2).flat, panels, strict=True
  ):
    for curve in curves:
      steps, values = series(records, curve)
      split = curve.split('/')[0]
      mark = 'o' if split == 'validation' else None
      ax.plot(
        steps, values, color=colours[split], label=split, marker=mark, ms=3
      )
    ax.set(xlabel='step', ylabel=label)
    ax.grid(alpha=0.25)
    if name == 'mse':
      ax.set_yscale('log')
      ax.legend(frameon=False)
    if name == 'usage':
      ax.yaxis.set_major_formatter(PercentFormatter(1.0))
      ax.set_ylim(0, 1.03)
    if name == 'perplexity':
      ax.set_ylim(bottom=0)
  figure.savefig(path, dpi=160)
