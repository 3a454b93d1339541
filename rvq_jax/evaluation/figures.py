"""Figures of one run, or of several methods side by side (paper 4.4).

`by_method` maps a method's name to its data.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from rvq_jax.metrics import psnr, to_float

_PANELS = {'mse': 'MSE on [-1, 1]', 'psnr': 'PSNR, dB'}
_PANELS |= {'usage': 'share of codes used', 'perplexity': 'perplexity'}
_OBJECTIVE_PANELS = {
  'lpips': 'LPIPS, VGG16',
  'logits_real': "discriminator's mean logit, real",
  'logits_fake': "discriminator's mean logit, generated",
  'discriminator_loss': "discriminator's loss",
  'adversarial_ramp': 'r(t), weight of the adversarial loss',
}
_SPLITS = {'train': '-', 'validation': '.:'}
_CURVES_NOTE = (
  'train: the mean since the previous point, over augmented images, by the '
  'model of each step.\n'
  'validation: the model at the point, with averaged parameters if the run '
  'has them, on the whole split; so it may lie below train.\n'
  'Usage and perplexity count the codes of these images: they rise with the '
  'number of tokens, which differs between the two.'
)


def reconstructions(
  originals, by_method, notes=None, *, errors: bool = True
) -> Figure:
  """Originals, then per method reconstructions, PSNR and 4 |difference|.

  Images and the data are uint8 [n, h, w, 3]; `notes` are lines by method.
  """
  n, _, width, _ = originals.shape
  rows = [('original', originals, [])]
  for name, images in by_method.items():
    decibels = np.asarray(psnr(to_float(images), to_float(originals)))
    label = '\n'.join([name, *(notes or {}).get(name, ())])
    rows.append((label, images, [f'{value:.1f} dB' for value in decibels]))
    error = np.abs(images.astype(np.float32) - originals).mean(-1)
    rows += [('error x 4', np.minimum(4 * error, 255), [])] * errors
  height = 1.35 * len(rows)
  axes = _axes(1.2 * n + 1.6, height, len(rows), layout='compressed')
  for ax, (label, images, ticks) in zip(axes, rows, strict=True):
    ax.imshow(np.concatenate([*images], 1), cmap='inferno', vmin=0, vmax=255)
    middles = (np.arange(len(ticks)) + 0.5) * width - 0.5
    ax.set_xticks(middles, ticks, fontsize=8)
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylabel(label, rotation=0, ha='right', va='center', wrap=True)
  return ax.figure


def code_usage(by_method) -> Figure:
  """How often each code is chosen (counts [K] or [L, K]) against its rank/K."""
  ax = _axes(8, 4.2)
  for name, counts in by_method.items():
    counts = np.sort(np.asarray(counts, np.float64), axis=None)[::-1]
    used = int((counts > 0).sum())
    rank = np.arange(1, used + 1) / counts.size
    name += f'\n{used:,} of {counts.size:,} codes used'
    ax.plot(rank, counts[:used] / counts.mean(), label=name)
  ax.axhline(1, color='0.5', linewidth=1, linestyle='--')
  ax.set(xlabel='codes, most used first, as a share of K', xlim=(0, 1))
  ax.set(ylabel='times chosen, 1 = the mean', yscale='log')
  return _finish(ax)


def curves(by_method) -> Figure:
  """Metrics over the steps: mean over the seeds, band from least to greatest.

  The data are the records of metrics.jsonl of each seed. Metrics of the
  objective appear if a run logged them. A vertical line marks the step at which
  a run begins to quantize.
  """
  runs = [run for seeds in by_method.values() for run in seeds]
  logged = {name for run in runs for record in run for name in record}
  more = {n: x for n, x in _OBJECTIVE_PANELS.items() if f'train/{n}' in logged}
  panels = _PANELS | more
  rows = -(-len(panels) // 2)
  axes = _axes(10.5, 3 * rows, rows, 2).flat
  for ax in axes[len(panels) :]:
    ax.remove()
  for ax, (metric, title) in zip(axes, panels.items(), strict=False):
    for i, seeds in enumerate(by_method.values()):
      for split, style in _SPLITS.items():
        lines = [_series(records, f'{split}/{metric}') for records in seeds]
        lines = [line for line in lines if line.size]
        if lines:
          steps = lines[0][0]
          values = np.stack([np.interp(steps, *line) for line in lines])
          ax.plot(steps, values.mean(0), style, color=f'C{i}')
          band = {'color': f'C{i}', 'alpha': 0.2, 'linewidth': 0}
          ax.fill_between(steps, values.min(0), values.max(0), **band)
    ax.set(xlabel='step', ylabel=title)
    ax.set_yscale('log' if metric == 'mse' else 'linear')
    ax.grid(alpha=0.25)
  starts = sorted({step for run in runs if (step := _first_codes(run))})
  for panel in ax.figure.axes:
    for step in starts:
      panel.axvline(step, color='0.5', linewidth=1, linestyle='--')
  for i, name in enumerate(by_method):
    ax.plot([], [], color=f'C{i}', label=name)
  for split, style in _SPLITS.items():
    ax.plot([], [], style, color='0.5', label=split)
  if starts:
    ax.plot([], [], '--', color='0.5', label='quantized from here on')
  ax.figure.supxlabel(_CURVES_NOTE, fontsize=8, color='0.3')
  return _finish(ax)


def _first_codes(records) -> int | None:
  """The last logged step of plain autoencoding, or None."""
  error = 'train/quantization_error'
  steps = {r['step']: error in r for r in records if 'train/mse' in r}
  before = [step for step, has in steps.items() if not has]
  return max(before, default=None) if any(steps.values()) else None


def _series(records, name: str) -> np.ndarray:
  """Steps and values of a metric, [2, n], without null values."""
  points = [(r['step'], r[name]) for r in records if r.get(name) is not None]
  return np.reshape(points, (-1, 2)).T


def prefixes(by_method) -> Figure:
  """MSE of the first codes ('prefixes' of metrics.json) against their bits."""
  ax = _axes(8, 4.2)
  for name, entries in by_method.items():
    points = [(entry['bits_per_image'], entry['mse']) for entry in entries]
    ax.plot(*zip(*points, strict=True), 'o-', label=name)
    for n, point in zip((e['tokens'] for e in entries), points, strict=True):
      ax.annotate(n, point, (4, 4), textcoords='offset points', fontsize=8)
  ax.set(xscale='log', xlabel='bits per image; beside the points: tokens')
  ax.set(yscale='log', ylabel='MSE on [-1, 1]')
  return _finish(ax)


def rate_figure(curve, codecs, methods) -> Figure:
  """MSE on [-1, 1] against bits per image, both logarithmic.

  Args:
    curve: bits and MSE of the Gaussian curve, each [n].
    codecs: from `codec_points`; dotted: without the files' headers.
    methods: from `summarise`; filled: fixed length, hollow: entropy.
  """
  ax = _axes(9, 4.8)
  ax.plot(*curve, color='0.7', label='Gaussian source,\nthe same covariance')
  for i, codec in enumerate(dict.fromkeys(r['codec'] for r in codecs)):
    points = [r for r in codecs if r['codec'] == codec]
    bits = np.array([r['bits_per_image'] for r in points])
    body = bits - [r['overhead_bits'] for r in points]
    mse, colour = [r['mse'] for r in points], f'{0.25 + 0.2 * i}'
    ax.plot(bits, mse, '.-', color=colour, label=codec)
    ax.plot(body, mse, '.:', color=colour, label=f'{codec} without headers')
  for i, row in enumerate(methods):
    mse, std = row['mse']['mean'], row['mse']['std']
    style = {'marker': 'osD^vP'[i % 6], 'color': f'C{i}', 'linestyle': 'none'}
    ax.plot([row['entropy_bits'], row['bits']], [mse, mse], color=f'C{i}', lw=1)
    ax.plot(row['entropy_bits'], mse, markerfacecolor='none', **style)
    ax.errorbar(row['bits'], mse, std, label=row['label'], capsize=3, **style)
  ax.set(xscale='log', xlabel='bits per image')
  ax.set(yscale='log', ylabel='MSE on [-1, 1]')
  # Cut off the curve below the lowest measurement.
  measured = [r['mse'] for r in codecs] + [m['mse']['mean'] for m in methods]
  ax.set_ylim(bottom=0.6 * min(mse for mse in measured if mse > 0))
  right = ax.twinx()
  right.set_ylim(*(10 * math.log10(4 / mse) for mse in ax.get_ylim()))
  right.set_ylabel('PSNR at that MSE, dB')
  return _finish(ax)


def _axes(width, height, *grid, layout='constrained'):
  return Figure(figsize=(width, height), layout=layout).subplots(*grid)


def _finish(ax):
  ax.grid(alpha=0.25)
  ax.figure.legend(loc='outside right upper', frameon=False, fontsize=8)
  return ax.figure
