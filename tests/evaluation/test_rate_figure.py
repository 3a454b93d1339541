"""The figure of distortion against rate."""

import numpy as np

from rvq_jax.evaluation import rate_distortion
from rvq_jax.evaluation.rate_figure import rate_figure


def drawing(points):
  bits = np.array([0, 10, 100, 1000])
  ramp = np.linspace(0, 255, 32).astype(np.uint8)
  images = np.broadcast_to(ramp[None, :, None, None], (2, 32, 32, 3))
  return {
    'curve_bits': bits,
    'curve_mse': rate_distortion.gaussian_curve(np.full(48, 0.3), bits),
    'codecs': rate_distortion.codec_points(images, qualities=(5, 50)),
    'points': points,
    'title': 'a title',
  }


def test_figure_shows_each_method_at_both_rates_and_psnr_at_the_right():
  point = {
    'label': 'f8',
    'colour': '#d62728',
    'bits': 224,
    'entropy_bits': 200,
    'mse': 0.03,
  }
  points = [point | {'mse_std': 0.002}, point | {'mse_std': None}]
  got = rate_figure(**drawing(points))
  left, right = got.axes
  ends = {tuple(line.get_xdata()) for line in left.lines}
  assert {(224,), (200,), (200, 224)} <= ends
  np.testing.assert_allclose(
    right.get_ylim(), 10 * np.log10(4 / np.array(left.get_ylim()))
  )
  labels = [text.get_text() for text in got.legends[0].get_texts()]
  assert labels.count('f8') == 2 and 'JPEG less its header' in labels
