"""Metrics against NumPy, scikit-image and the tokens themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import one_line
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rvq_jax import metrics


def pair(height=24, width=17, noise=40, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 256, (3, height, width, 3))
  y = np.clip(x + rng.integers(-noise, noise + 1, x.shape), 0, 255)
  return x.astype(np.uint8), y.astype(np.uint8)


def to_model(x):
  return jnp.asarray(x, jnp.float32) / 127.5 - 1


def test_psnr_equals_scikit_image():
  x, y = pair()
  got = jax.jit(metrics.psnr)(to_model(x), to_model(y))
  want = [peak_signal_noise_ratio(a, b) for a, b in zip(x, y, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_psnr_rounds_and_clips_as_a_file_would_and_is_finite():
  x = to_model(pair(8, 8)[0])
  y = jnp.where(x == 1, 7.0, x + 0.4 / 127.5)  # less than half a level
  got = metrics.psnr(x, y)
  np.testing.assert_allclose(got, 10 * np.log10(255**2 * 192), rtol=1e-5)
  np.testing.assert_array_equal(got, metrics.psnr(x, x))


@pytest.mark.parametrize('noise', [5, 40, 255])
def test_ssim_equals_scikit_image_in_the_stated_variant(noise):
  x, y = pair(noise=noise)
  got = jax.jit(metrics.ssim)(to_model(x), to_model(y))
  variant = {'gaussian_weights': True, 'sigma': 1.5, 'data_range': 255}
  variant |= {'use_sample_covariance': False, 'channel_axis': 2, 'full': True}
  maps = [
    structural_similarity(a, b, **variant)[1] for a, b in zip(x, y, strict=True)
  ]
  want = [index[5:-5, 5:-5].mean() for index in maps]
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_ssim_of_images_smaller_than_the_window_is_nan():
  x, y = pair(10, 32)
  assert np.isnan(metrics.ssim(to_model(x), to_model(y))).all()


def test_squared_error_is_on_the_scale_of_the_input():
  x, y = pair()
  got = metrics.squared_error(to_model(x), to_model(y))
  want = ((x / 127.5 - y / 127.5) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize('name', ['squared_error', 'psnr', 'ssim'])
def test_images_of_bytes_mean_the_same_and_other_integers_are_refused(name):
  metric, (x, y) = getattr(metrics, name), pair()
  want = metric(to_model(x), to_model(y))
  for a, b in ((x, y), (x, to_model(y))):
    np.testing.assert_array_equal(metric(a, b), want)
  with one_line('expected images as uint8 or float .*, got int32'):
    metric(x.astype(np.int32), y.astype(np.int32))


def test_even_use_of_m_codes_has_perplexity_m():
  counts = np.float32([5, 5, 5, 5, 0, 0, 0, 0])
  want = {'usage': 0.5, 'perplexity': 4}
  assert jax.jit(metrics.diversity)(counts) == pytest.approx(want)
  want |= {'perplexity_ratio': 0.5, 'entropy_bits': 2}
  assert metrics.code_statistics(counts) == pytest.approx(want)
  assert metrics.code_statistics([0, 0])['usage'] == 0


@given(st.lists(st.integers(0, 1000), min_size=1).filter(any))
def test_perplexity_lies_between_one_and_the_codes_used(counts):
  got = metrics.code_statistics(counts)
  used = got['usage'] * len(counts)
  assert 1 - 1e-9 <= got['perplexity'] <= used * (1 + 1e-9)


@pytest.mark.parametrize(
  ('spread', 'components'),
  [
    *([[2, 2, 2, 0], 3], [[1, 0, 0, 0], 1], [[3, 1, 1, 1], 4]),
    *([[300, 1, 1, 0], 1], [[100, 1, 1, 0], 2]),
  ],
)
def test_dimensions_are_those_of_the_spread(spread, components):
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
  x = 5 + (rng.normal(size=(200_000, 4)) * np.sqrt(spread)) @ turn
  p = np.array(spread) / sum(spread)
  want = np.exp(-sum(v * np.log(v) for v in p if v))
  got = metrics.effective_dimension(x.sum(0), x.T @ x, len(x))
  np.testing.assert_allclose(got, want, rtol=1e-2)
  assert metrics.components_99(x.sum(0), x.T @ x, len(x)) == components


def test_bit_rates_count_fixed_and_entropy_coded_bits():
  want = {'bits_per_image': 224, 'bits_per_pixel': 224 / 1024}
  want['entropy_bits_per_pixel'] = 192 / 1024
  assert metrics.bit_rates(16, 32 * 32, 16384, 12.0) == want


K = 50


def draw(*sizes, seed=0):
  """Batches of ids, later codes rarer, each batch around another code."""
  rng = np.random.default_rng(seed)
  return [(rng.geometric(0.2, n) + 5 * i) % K for i, n in enumerate(sizes)]


def define(batches):
  codes = metrics.CodeDefinitions()
  for ids in batches:
    codes.add(np.bincount(ids, minlength=K))
  return codes.result()


def used(ids):
  return len(set(ids.tolist())) / K


def entropy(ids):
  p = np.unique(ids, return_counts=True)[1] / ids.size
  return -(p * np.log(p)).sum()


@pytest.mark.parametrize(
  ('name', 'sizes', 'counted', 'text'),
  [
    ('whole_split', (40, 40, 7), 3, 'all 87 tokens'),
    # Only whole batches, as few of the last ones as fill the window.
    ('last_65536_tokens', (20_000, 30_000, 30_000, 10_000), 3, '70,000'),
    ('last_65536_tokens', (1000, 32_768, 32_768), 2, '65,536 tokens;'),
    ('last_65536_tokens', (40, 40), 2, 'the whole split, 80 tokens'),
  ],
)
def test_a_definition_counts_its_tokens(name, sizes, counted, text):
  batches = draw(*sizes)
  entry, ids = define(batches)[name], np.concatenate(batches[-counted:])
  np.testing.assert_allclose(entry['usage'], used(ids))
  np.testing.assert_allclose(entry['perplexity'], np.exp(entropy(ids)))
  assert entry['tokens'] == ids.size and text in entry['definition']


def test_the_mean_over_batches_is_that_of_each_batch():
  batches = draw(40, 40, 7)
  entry = define(batches)['mean_over_batches']
  np.testing.assert_allclose(entry['usage'], np.mean([*map(used, batches)]))
  mean = np.mean([np.exp(entropy(ids)) for ids in batches])
  np.testing.assert_allclose(entry['perplexity'], mean)
  assert entry['tokens'] == 29 and '3 batches' in entry['definition']


def test_of_several_codebooks_the_entropies_are_averaged():
  heads = [draw(40_000, 40_000, 500, seed=seed) for seed in (0, 1)]
  codes = metrics.CodeDefinitions()
  for pair in zip(*heads, strict=True):
    codes.add(np.stack([np.bincount(ids, minlength=K) for ids in pair]))
  parts = [np.concatenate(head) for head in heads]
  for name in ('whole_split', 'last_65536_tokens'):
    entry = codes.result()[name]
    mean = np.mean([entropy(ids) for ids in parts])
    np.testing.assert_allclose(entry['perplexity'], np.exp(mean))
    np.testing.assert_allclose(entry['usage'], np.mean([*map(used, parts)]))
    assert entry['tokens'] == 80_500
    assert 'tokens per codebook' in entry['definition']


def test_batches_without_tokens_are_left_out():
  batches, empty = draw(40, 7), np.zeros(0, int)
  assert define([empty, *batches, empty]) == define(batches)
  with pytest.raises(ValueError, match='at least one batch'):
    define([empty])


def test_every_definition_has_a_line():
  result = define(draw(40, 40))
  lines = metrics.format_definitions(result).splitlines()[1:]
  for line, (name, entry) in zip(lines, result.items(), strict=True):
    assert line.split()[0] == name and line.endswith(entry['definition'])
    assert f'{entry["usage"]:.2%}' in line
