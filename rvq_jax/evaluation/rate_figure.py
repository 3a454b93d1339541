"""The figure of distortion against rate: methods, codecs, Gaussian curve."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

_BLUE, _MARKERS = '#1f5fa8', 'osD^vP'
_CODECS = ('0.6', '0.25', '#5b8a5b')


def rate_figure(
  *,
  curve_bits,
  curve_mse,
  codecs: Sequence[Mapping],
  points: Sequence[Mapping],
  title: str,
) -> Figure:
  """Draws MSE against bits an image, both logarithmic.

  Args:
    curve_bits: rates of the Gaussian curve, [n]; those at 0 are left out.
    curve_mse: its MSE on [-1, 1], [n].
    codecs: records of `rate_distortion.codec_points`. Where the header is more
      than a tenth of the smallest file, a dotted line shows the codec without
      it.
    points: {'label', 'colour', 'bits', 'entropy_bits', 'mse', 'mse_std'} of
      each method: bits an image at fixed length (filled) and entropy-coded
      (hollow); mse_std is drawn as an error bar unless it is None.
    title: above the plot.

  Returns:
    A matplotlib figure.
  """
  result = Figure(figsize=(9, 4.8), layout='constrained')
  ax = result.subplots()
  curve_bits, curve_mse = np.asarray(curve_bits), np.asarray(curve_mse)
  ax.plot(
    curve_bits[curve_bits > 0],
    curve_mse[curve_bits > 0],
    color=_BLUE,
    label='Gaussian source,\nthe same covariance',
  )
  _draw_codecs(ax, codecs)
  _draw_points(ax, points)
  ax.set(
    xscale='log',
    yscale='log',
    xlabel='bits an image',
    ylabel='MSE on [-1, 1]',
    title=title,
  )
  ax.grid(alpha=0.25)
  measured = [r['mse'] for r in (*codecs, *points) if r['mse'] > 0]
  if measured:  # the curve goes on below, where nothing is to be compared
    ax.set_ylim(bottom=0.6 * min(measured))
  fixed = [point['bits'] for point in points]
  if fixed:  # a collapsed codebook has an entropy near 0: it leaves the plot
    lowest = min(point['entropy_bits'] for point in points)
    ax.set_xlim(left=max(0.7 * lowest, 0.1 * min(fixed)))
  right = ax.twinx()
  right.set_ylim(*(10 * math.log10(4 / mse) for mse in ax.get_ylim()))
  right.set_ylabel('PSNR at that MSE, dB')
  result.legend(loc='outside right upper', frameon=False, fontsize=9)
  return result


def _draw_codecs(ax, codecs: Sequence[Mapping]) -> None:
  """Draws each codec as a line, and as another one without its header."""
  for i, codec in enumerate(dict.fromkeys(r['codec'] for r in codecs)):
    bits, overhead, mse = np.array(
      [
        (r['bits_per_image'], r['overhead_bits'], r['mse'])
        for r in codecs
        if r['codec'] == codec
      ]
    ).T
    style = {'color': _CODECS[i % len(_CODECS)], 'linewidth': 1, 'marker': '.'}
    ax.plot(bits, mse, label=codec, ms=5, **style)
    kept = bits > overhead
    if overhead.max() > 0.1 * bits.min() and kept.any():
      label = f'{codec} less its header'
      bits, mse = (bits - overhead)[kept], mse[kept]
      ax.plot(bits, mse, ':', label=label, ms=3, **style)


def _draw_points(ax, points: Sequence[Mapping]) -> None:
  """Draws each method: filled at fixed length, hollow when entropy-coded."""
  for i, point in enumerate(points):
    colour = point['colour']
    marker = {'marker': _MARKERS[i % len(_MARKERS)], 'linestyle': 'none'}
    marker |= {'color': colour, 'ms': 6, 'zorder': 3}
    bits, entropy, mse = (point[k] for k in ('bits', 'entropy_bits', 'mse'))
    ax.plot([entropy, bits], [mse, mse], color=colour, linewidth=0.8)
    ax.errorbar(bits, mse, point['mse_std'], capsize=3, **marker)
    ax.plot(bits, mse, label=point['label'], **marker)
    ax.plot(entropy, mse, markerfacecolor='none', **marker)
  if points:
    key = {'color': '0.25', 'marker': 'o', 'linestyle': 'none', 'ms': 5}
    ax.plot([], [], label='filled: fixed length', **key)
    ax.plot([], [], label='hollow: entropy-coded', mfc='none', **key)
