"""Evaluation of a run, and the tokenizer that `load` returns."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from rvq_jax import load
from rvq_jax.data import loaders
from rvq_jax.evaluation import evaluate
from rvq_jax.evaluation.evaluate import UNITS, evaluate_run, format_table
from rvq_jax.training import loop, sharding
from rvq_jax.training.checkpoints import Checkpoints


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


def test_a_run_of_another_version_is_refused_in_one_line(run, monkeypatch):
  meta = Checkpoints.meta

  def older(self, step):
    found = meta(self, step)
    del found['config']['model.quantizer']
    return found

  monkeypatch.setattr(Checkpoints, 'meta', older)
  with pytest.raises(ValueError, match='another version.*model.quantizer'):
    load(run)


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


def test_saved_images_are_those_of_the_tokenizer(run, test_images, tmp_path):
  evaluate_run(run, save_images=tmp_path)
  output = np.asarray(load(run).reconstruct(test_images))
  shown = np.round((np.clip(output, -1, 1) + 1) * 127.5).astype(int)
  for i in range(11):
    with Image.open(tmp_path / 'originals' / f'{i:06d}.png') as image:
      np.testing.assert_array_equal(image, test_images[i])
    with Image.open(tmp_path / 'reconstructions' / f'{i:06d}.png') as image:
      # Another batch size may round another way.
      difference = np.abs(np.asarray(image, int) - shown[i])
      assert difference.max() <= 1 and (difference == 0).mean() > 0.98
  assert len(list(tmp_path.rglob('*.png'))) == 2 * 11


def test_saved_images_say_what_they_are(run, tmp_path):
  evaluate_run(run, split='validation', step=3, save_images=tmp_path)
  about = json.loads((tmp_path / 'about.json').read_text())
  assert about['data'].startswith('folder:')
  assert (about['split'], about['step'], about['count']) == (
    'validation',
    3,
    12,
  )
  assert about['image_size'] == 16
  assert about['crop'] == 'scaled and centre-cropped'


def test_saved_images_of_another_step_are_refused_before_the_work(
  run, tmp_path, monkeypatch
):
  evaluate_run(run, step=3, save_images=tmp_path)
  monkeypatch.setattr(evaluate, 'evaluate_split', None)
  with pytest.raises(ValueError, match='of another run'):
    evaluate_run(run, step=6, save_images=tmp_path)


def test_a_split_is_read_once(run, monkeypatch):
  calls = []

  def counted(*arguments, real=loaders.eval_batches, **named):
    calls.append(arguments)
    return real(*arguments, **named)

  monkeypatch.setattr(loaders, 'eval_batches', counted)
  evaluate_run(run)
  assert len(calls) == 1


def test_definitions_stand_beside_the_metrics(run, test_images):
  result = evaluate_run(run, definitions=True)
  stored = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert stored['definitions'] == result['definitions']
  whole = result['definitions']['whole_split']
  assert whole['usage'] == result['usage']
  assert whole['perplexity'] == result['perplexity']
  ids = np.asarray(load(run).encode(test_images)).reshape(11, -1)
  batches = [len(set(part.flat)) / 16 for part in (ids[:8], ids[8:])]
  entry = result['definitions']['mean_over_batches']
  np.testing.assert_allclose(entry['usage'], np.mean(batches))


def test_perceptual_metrics_are_stored_and_shown(run, monkeypatch):
  folders = []

  def measured(folder):
    folders.append(folder)
    assert len(list((folder / 'originals').glob('*.png'))) == 11
    return {'rfid': 3.5, 'rfid_definition': 'of 11 images'}

  monkeypatch.setattr(evaluate, 'import_packages', lambda: None)
  monkeypatch.setattr(evaluate, 'perceptual_metrics', measured)
  result = evaluate_run(run, perceptual=True)
  assert not folders[0].exists()
  stored = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert (stored['rfid'], stored['rfid_definition']) == (3.5, 'of 11 images')
  assert format_table(result, '').splitlines()[-1].split(maxsplit=2) == [
    'rfid',
    '3.5000',
    'of 11 images',
  ]


def test_several_processes_cannot_write_images(monkeypatch, tmp_path):
  monkeypatch.setattr(evaluate.jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='single process, got 2'):
    evaluate_run(tmp_path, save_images=tmp_path)


def test_bits_of_several_codebooks_are_those_of_one_times_their_tokens():
  sums = {name: 2.0 for name in ('mse', 'psnr', 'ssim', 'images')}
  sums |= {'tokens': 2 * 8 * 3.0, 'quantization_error': 0.0}
  sums['counts'] = np.full((3, 4), 4.0)
  batch = {'image': np.zeros((2, 8, 8, 3), np.uint8), 'mask': np.ones(2, bool)}
  seen = []
  result, counts = evaluate.evaluate_split(
    lambda variables, batch: sums,
    {},
    [batch],
    mesh=sharding.data_mesh(jax.devices()[:1]),
    on_batch=lambda *arguments: seen.append(arguments),
  )
  assert result['bits_per_image'] == 8 * 3 * 2
  assert counts.shape == (3, 4)
  assert len(seen) == 1 and seen[0][0] is batch
  np.testing.assert_array_equal(seen[0][1]['counts'], sums['counts'])


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
    state = loop.Run(_nested(tokenizer.config), run).start(checkpoints)
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
