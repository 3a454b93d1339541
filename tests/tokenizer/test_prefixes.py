"""The first codes alone: what an evaluation says of them."""

import jax
import numpy as np
import pytest

from rvq_jax import sharding
from rvq_jax.evaluation import figures
from rvq_jax.evaluation.evaluate import format_table
from rvq_jax.metrics import to_float
from rvq_jax.training.validation import (
  PREFIX_UNITS,
  evaluate_split,
  make_eval_step,
)

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.mark.parametrize(
  'name', [pytest.param('multiscale', marks=pytest.mark.slow), 'residual']
)
def test_prefixes_are_measured_over_a_split(make_tokenizer, test_images, name):
  tokenizer = make_tokenizer(quantizer=name, depth=2)
  images = np.resize(test_images, (2, 6, *test_images.shape[1:]))
  masks = np.arange(12).reshape(2, 6) < 11
  pairs = zip(images, masks, strict=True)
  batches = [{'image': image, 'mask': mask} for image, mask in pairs]
  step = jax.jit(make_eval_step(tokenizer.model, prefixes=tokenizer.prefixes))
  mesh = sharding.data_mesh()
  result, _ = evaluate_split(step, tokenizer.variables, batches, mesh=mesh)
  entries, ids = result['prefixes'], np.asarray(tokenizer.encode(test_images))
  first = 0
  for end, entry in zip(tokenizer.prefixes, entries, strict=True):
    assert list(entry) == list(PREFIX_UNITS)
    made = np.asarray(tokenizer.decode(ids[..., :end]))
    error = ((made - to_float(test_images)) ** 2).mean()
    np.testing.assert_allclose(entry['mse'], error, rtol=1e-4)
    assert entry['tokens'] == ids[0, ..., :end].size
    assert entry['bits_per_image'] == entry['tokens'] * 4
    own = ids[..., first:end]
    first = end
    p = np.bincount(own.ravel(), minlength=16) / own.size
    usage = (p > 0).sum() / min(16, own.size)
    np.testing.assert_allclose(entry['usage'], usage, rtol=1e-6)
    perplexity = np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
    np.testing.assert_allclose(entry['perplexity'], perplexity, rtol=1e-6)
  for metric in ('mse', 'psnr', 'quantization_error'):
    np.testing.assert_allclose(entry[metric], result[metric], rtol=1e-6)
  assert entries[0]['quantization_error'] != entry['quantization_error']
  table = format_table(result, 'title')
  assert all(f'{entry["mse"]:,.6g}' in table for entry in entries)


def test_the_figure_has_a_point_of_each_prefix():
  entries = [
    {'tokens': n, 'bits_per_image': 4.0 * n, 'mse': 1 / n} for n in (1, 5, 14)
  ]
  (axes,) = figures.prefixes({'one': entries, 'two': entries[:2]}).axes
  x, y = axes.lines[0].get_data()
  np.testing.assert_array_equal(x, [4, 20, 56])
  np.testing.assert_allclose(y, [1, 1 / 5, 1 / 14])
  assert [text.get_text() for text in axes.texts] == ['1', '5', '14', '1', '5']
