"""Figures: the numbers that their lines and labels show."""

import numpy as np

from rvq_jax.evaluation import figures
from rvq_jax.paper import rate_distortion


def lines(ax):
  return {(*line.get_xdata(),): [*line.get_ydata()] for line in ax.lines}


def labels(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def test_reconstructions_show_psnr_and_error():
  originals = np.full((2, 4, 4, 3), 100, np.uint8)
  images = originals + np.array([10, 20], np.uint8)[:, None, None, None]
  figure = figures.reconstructions(originals, {'ours': images})
  _, middle, last = figure.axes
  ticks = [tick.get_text() for tick in middle.get_xticklabels()]
  assert ticks == ['28.1 dB', '22.1 dB']  # 20 log10(255 / error)
  error = last.images[0].get_array()
  np.testing.assert_array_equal(error, np.tile([[40] * 4 + [80] * 4], (4, 1)))


def test_code_usage_is_sorted_and_relative_to_the_mean():
  figure = figures.code_usage({'ours': [1, 0, 6, 1]})
  assert lines(figure.axes[0])[0.25, 0.5, 0.75] == [3, 0.5, 0.5]
  assert labels(figure) == ['ours\n3 of 4 codes used']


def test_curves_show_mean_and_band_of_the_seeds():
  seeds = [
    [{'step': s, 'train/mse': s * k} for s in (1, 2)]
    + [{'step': 2, 'validation/psnr': 20.0, 'train/mse': None}]
    for k in (1, 3)
  ]
  figure = figures.curves({'ours': seeds})
  mse, psnr, *_ = figure.axes
  assert lines(mse)[1, 2] == [2, 4] and lines(psnr)[2,] == [20]
  band = mse.collections[0].get_paths()[0].vertices
  assert {(1, 1), (1, 3), (2, 2), (2, 6)} <= {*map(tuple, band)}


def test_curves_say_where_codes_begin_and_what_train_and_validation_are():
  error = {'train/quantization_error': 0.1}
  late = [{'step': s, 'train/mse': 1.0} for s in (1, 2)]
  late += [late[0] | error | {'step': 3}, {'step': 2, 'validation/psnr': 9.0}]
  figure = figures.curves({'late': [late], 'at once': [[late[2]]]})
  for ax in figure.axes:
    assert (2, 2) in lines(ax)
  assert labels(figure)[-1] == 'quantized from here on'
  assert 'augmented images' in figure.get_supxlabel()
  figure = figures.curves({'at once': [[late[2]]]})
  assert labels(figure) == ['at once', 'train', 'validation']


def test_curves_show_the_objective_where_it_was_logged():
  names = ('lpips', 'logits_real', 'logits_fake', 'discriminator_loss')
  names = 'usage', *names, 'adversarial_ramp'
  records = [
    {'step': s} | {f'train/{n}': s * i for i, n in enumerate(names)}
    for s in (1, 2)
  ]
  plain = [{'step': 1, 'train/mse': 0.5}]
  assert len(figures.curves({'mse': [plain]}).axes) == 4
  axes = figures.curves({'mse': [plain], 'both': [records]}).axes
  drawn = [lines(ax)[1, 2] for ax in axes[2:] if (1, 2) in lines(ax)]
  assert drawn == [[i, 2 * i] for i in range(6)]  # 0, usage, too


def test_each_method_stands_at_both_rates_with_psnr_at_the_right():
  bits = np.array([10, 100, 1000])
  ramp = np.linspace(0, 255, 32).astype(np.uint8)
  images = np.broadcast_to(ramp[None, :, None, None], (2, 32, 32, 3))
  codecs = rate_distortion.codec_points(images, qualities=(5, 50))
  row = {'label': 'f8', 'bits': 224, 'entropy_bits': 200}
  methods = [row | {'mse': {'mean': 0.03, 'std': s}} for s in (0.002, None)]
  figure = figures.rate_figure((bits, 1 / bits), codecs, methods)
  left, right = figure.axes
  assert {(224,), (200,), (200, 224), (10, 100, 1000)} <= set(lines(left))
  np.testing.assert_allclose(
    right.get_ylim(), 10 * np.log10(4 / np.array(left.get_ylim()))
  )
  assert labels(figure).count('f8') == 2
  assert 'JPEG without headers' in labels(figure)
