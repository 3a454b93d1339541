"""Evaluation of a run, and the tokenizer that `load` returns."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from rvq_jax import load
from rvq_jax.evaluation.evaluate import UNITS, evaluate_run, format_table
from rvq_jax.training import loop


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('run')


@pytest.fixture
def run(workdir, tiny_config):
  """A finished run of 6 steps; trained once for the module."""
  tiny_config.optimizer.params_ema = 0.9
  loop.train(tiny_config, workdir)
  return workdir


@pytest.fixture
def test_images(image_folder):
  """The 11 test images as evaluation sees them, uint8 [11, 16, 16, 3]."""
  paths = sorted(
    (image_folder / 'test').rglob('*.png'),
    key=lambda p: (p.parent.name, p.name),
  )
  return np.stack([np.asarray(Image.open(p))[:, 2:18] for p in paths])


def test_metrics_are_those_of_the_tokenizer_over_the_whole_split(
  run, test_images
):
  result = evaluate_run(run)
  assert list(result) == list(UNITS)
  assert (result['images'], result['tokens']) == (11, 11 * 16)
  tokenizer = load(run)
  ids = np.asarray(tokenizer.encode(test_images))
  output = np.asarray(tokenizer.decode(ids))
  target = test_images / 127.5 - 1
  error = (output - target) ** 2
  np.testing.assert_allclose(result['mse'], error.mean(), rtol=1e-4)
  np.testing.assert_allclose(result['mse_01'], error.mean() / 4, rtol=1e-4)
  shown = np.round((np.clip(output, -1, 1) + 1) * 127.5).astype(np.uint8)
  levels = ((shown.astype(float) - test_images) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(
    result['psnr'], (10 * np.log10(255**2 / levels)).mean(), rtol=1e-4
  )
  similarity = [
    structural_similarity(
      a,
      b,
      channel_axis=2,
      gaussian_weights=True,
      sigma=1.5,
      full=True,
      use_sample_covariance=False,
      data_range=255,
    )[1][5:-5, 5:-5].mean()
    for a, b in zip(shown, test_images, strict=True)
  ]
  np.testing.assert_allclose(result['ssim'], np.mean(similarity), atol=1e-3)
  p = np.bincount(ids.reshape(-1), minlength=16) / ids.size
  entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
  np.testing.assert_allclose(result['perplexity'], np.exp(entropy), rtol=1e-6)
  assert result['usage'] == (p > 0).mean()
  assert result['bits_per_image'] == 16 * 4


def test_files_are_written_and_say_what_they_are(run):
  result = evaluate_run(run, split='validation', step=3)
  folder = run / 'evaluation' / 'validation'
  stored = json.loads((folder / 'metrics.json').read_text())
  assert stored['step'] == 3 and stored['split'] == 'validation'
  assert stored['mse'] == result['mse']
  for path in (
    folder / 'reconstructions.png',
    folder / 'code_usage.png',
    run / 'evaluation' / 'curves.png',
  ):
    with Image.open(path) as image:
      assert min(image.size) > 200


def test_reconstruct_is_decode_of_encode_to_the_bit(run, test_images):
  tokenizer = load(run)
  ids = tokenizer.encode(test_images)
  assert ids.shape == (11, 4, 4) and ids.dtype == jnp.int32
  a, b = tokenizer.decode(ids), tokenizer.reconstruct(test_images)
  assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_floats_and_uint8_give_the_same_ids(run, test_images):
  tokenizer = load(run)
  floats = (test_images / 127.5 - 1).astype(np.float32)
  np.testing.assert_array_equal(
    tokenizer.encode(test_images), tokenizer.encode(floats)
  )


def test_other_image_sizes_are_encoded_too(run):
  ids = load(run, 'best').encode(np.zeros((1, 8, 24, 3), np.uint8))
  assert ids.shape == (1, 2, 6)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((1, 15, 16, 3), np.uint8), 'multiples of 4, got 15x16'),
    (np.zeros((1, 16, 16, 3), np.int32), 'uint8 or float'),
    (np.full((1, 16, 16, 3), 255.0), r'in \[-1, 1\], got values from 255'),
    (np.full((1, 16, 16, 3), np.nan), r'in \[-1, 1\]'),
    (np.zeros((16, 16, 3), np.uint8), r'\[B, h, w, 3\]'),
  ],
)
def test_other_inputs_are_refused(run, images, message):
  with pytest.raises(ValueError, match=message):
    load(run).encode(images)


@pytest.mark.parametrize(
  ('ids', 'message'),
  [
    (np.full((1, 4, 4), 16), 'from 0 to 15, got 16 to 16'),
    (np.full((1, 4, 4), -1), 'from 0 to 15, got -1'),
    (np.zeros((4, 4), int), r'ids \[B, H, W\]'),
    (np.zeros((1, 4, 4)), 'integers'),
  ],
)
def test_other_ids_are_refused(run, ids, message):
  with pytest.raises(ValueError, match=message):
    load(run).decode(ids)


def test_missing_runs_and_steps_are_named(run, tmp_path):
  with pytest.raises(FileNotFoundError, match='expected a run'):
    load(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match='step 99 .* found steps'):
    load(run, 99)
  with pytest.raises(ValueError, match='train, validation, test'):
    evaluate_run(run, split='dev')


def test_the_averaged_parameters_are_loaded(run):
  tokenizer = load(run)
  with loop.Checkpoints(run, read_only=True) as checkpoints:
    state = loop.Trainer(_nested(tokenizer.config), run).start(checkpoints)
  kernel = np.asarray(tokenizer.variables['params']['encoder']['out']['kernel'])
  np.testing.assert_array_equal(
    kernel, state.params_ema['encoder']['out']['kernel']
  )
  assert np.any(kernel != state.params['encoder']['out']['kernel'])


def _nested(flat):
  config = {}
  for name, value in flat.items():
    *parents, leaf = name.split('.')
    group = config
    for parent in parents:
      group = group.setdefault(parent, {})
    group[leaf] = value
  return config


def test_the_table_names_every_metric():
  text = format_table(dict.fromkeys(UNITS, 0.5) | {'images': 10000}, 'title')
  assert text.splitlines()[0] == 'title'
  assert all(name in text for name in UNITS)
  assert '10,000' in text
