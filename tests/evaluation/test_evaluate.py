"""Evaluation of a run over a split."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from rvq_jax import VectorQuantizer, load, metrics, sharding
from rvq_jax.data import loaders
from rvq_jax.data.images import to_float
from rvq_jax.data.sources import SPLITS
from rvq_jax.evaluation import evaluate
from rvq_jax.evaluation.evaluate import UNITS, evaluate_run, format_table
from rvq_jax.training.loop import train


@pytest.fixture
def measured(run):
  """What `evaluate_run` stored for the test split."""
  return json.loads((run / 'evaluation/test/metrics.json').read_text())


@pytest.fixture
def no_figures(monkeypatch):
  monkeypatch.setattr(evaluate, '_draw', lambda *_: None)


def shown(images):
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def test_metrics_are_those_of_the_tokenizer_over_the_whole_split(
  run, measured, test_images
):
  result = measured
  assert set(UNITS) < set(result)
  assert (result['images'], result['tokens']) == (11, 11 * 16)
  tokenizer = load(run)
  ids = np.asarray(tokenizer.encode(test_images))
  output = np.asarray(tokenizer.decode(ids))
  error = ((output - (test_images / 127.5 - 1)) ** 2).mean()
  np.testing.assert_allclose(result['mse'], error, rtol=1e-4)
  np.testing.assert_allclose(result['mse_01'], error / 4, rtol=1e-4)
  levels = ((shown(output).astype(float) - test_images) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(
    result['psnr'], (10 * np.log10(255**2 / levels)).mean(), rtol=1e-4
  )
  similarity = metrics.ssim(output, to_float(test_images))
  np.testing.assert_allclose(result['ssim'], similarity.mean(), atol=1e-3)
  p = np.bincount(ids.reshape(-1), minlength=16) / ids.size
  entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
  np.testing.assert_allclose(result['perplexity'], np.exp(entropy), rtol=1e-6)
  assert result['usage'] == (p > 0).mean()
  assert result['bits_per_image'] == 16 * 4


def test_choosing_a_step_on_the_images_is_said(
  run, measured, no_figures, tmp_path, caplog
):
  evaluate_run(run, split='validation', step='best', output=tmp_path)
  assert "'best' was chosen on these images" in caplog.text
  for folder in tmp_path / 'validation', run / 'evaluation/test':
    stored = json.loads((folder / 'metrics.json').read_text())
    assert stored['chosen_on_these_images'] is (folder.name == 'validation')


def test_the_round_trip_is_compared_with_the_forward_pass(
  run, measured, no_figures, monkeypatch
):
  assert measured['roundtrip_error'] == 0
  real = VectorQuantizer.codes_from_ids
  monkeypatch.setattr(
    VectorQuantizer, 'codes_from_ids', lambda self, ids: real(self, ids + 1)
  )
  assert evaluate_run(run)['roundtrip_error'] > 1e-3
  stored = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert stored['roundtrip_error'] > 1e-3


def test_devices_need_not_divide_the_batch(
  run, measured, no_figures, monkeypatch
):
  mesh = sharding.data_mesh(jax.devices()[:3])
  monkeypatch.setattr(evaluate.sharding, 'data_mesh', lambda: mesh)
  got = evaluate_run(run)
  for name in UNITS:
    np.testing.assert_allclose(got[name], measured[name], rtol=1e-4)


def test_files_are_written_and_say_what_they_are(run):
  result = evaluate_run(run, split='validation', step=3)
  folder = run / 'evaluation' / 'validation'
  stored = json.loads((folder / 'metrics.json').read_text())
  assert stored['step'] == 3 and stored['split'] == 'validation'
  assert stored['data'].startswith('folder:')
  assert stored['mse'] == result['mse']
  for name in ('reconstructions', 'code_usage', '../curves'):
    with Image.open(folder / f'{name}.png') as image:
      assert min(image.size) > 200
  counts = np.load(folder / 'code_counts.npy', allow_pickle=False)
  assert counts.shape == (16,) and counts.sum() == result['tokens']
  samples = np.asarray(Image.open(folder / 'samples.png'))
  assert samples.shape == (32, 8 * 16, 3)


def test_saved_images_are_those_of_the_tokenizer(
  run, test_images, no_figures, tmp_path
):
  evaluate_run(run, save_images=tmp_path / 'images')
  output = shown(np.asarray(load(run).reconstruct(test_images))).astype(int)
  for i in range(11):
    originals, reconstructions = (
      np.asarray(Image.open(tmp_path / 'images' / kind / f'{i:06d}.png'), int)
      for kind in ('originals', 'reconstructions')
    )
    np.testing.assert_array_equal(originals, test_images[i])
    # Another batch size may round another way.
    difference = np.abs(reconstructions - output[i])
    assert difference.max() <= 1 and (difference == 0).mean() > 0.98
  assert len(list(tmp_path.rglob('*.png'))) == 2 * 11


def test_definitions_stand_beside_the_metrics_of_a_split_read_once(
  run, test_images, no_figures, monkeypatch
):
  calls = []

  def counted(*arguments, real=loaders.eval_batches, **named):
    calls.append(arguments)
    return real(*arguments, **named)

  monkeypatch.setattr(loaders, 'eval_batches', counted)
  result = evaluate_run(run, definitions=True)
  assert len(calls) == 1
  stored = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert stored['definitions'] == result['definitions']
  whole = result['definitions']['whole_split']
  assert whole['usage'] == result['usage']
  assert whole['perplexity'] == result['perplexity']
  ids = np.asarray(load(run).encode(test_images)).reshape(11, -1)
  batches = [len(set(part.flat)) / 16 for part in (ids[:8], ids[8:])]
  entry = result['definitions']['mean_over_batches']
  np.testing.assert_allclose(entry['usage'], np.mean(batches))


def test_perceptual_metrics_are_stored_and_shown(
  run, no_figures, monkeypatch, tmp_path
):
  def of_files(folder, opened):
    assert opened == 'opened'
    for kind in ('originals', 'reconstructions'):
      assert len(list((tmp_path / folder / kind).glob('*.png'))) == 11
    return {'rfid': 3.5, 'rfid_definition': 'of 11 images'}

  monkeypatch.setattr(evaluate.networks, 'open_metrics', lambda: 'opened')
  monkeypatch.setattr(evaluate.networks, 'perceptual_metrics', of_files)
  result = evaluate_run(run, perceptual=True)
  stored = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert (stored['rfid'], stored['rfid_definition']) == (3.5, 'of 11 images')
  last = format_table(result, '').splitlines()[-1]
  assert last.split(maxsplit=2) == ['rfid', '3.5000', 'of 11 images']


def test_wrong_requests_end_before_the_work(run, monkeypatch, tmp_path):
  monkeypatch.setattr(evaluate, 'load', None)
  with pytest.raises(ValueError, match='one of train, validation, test, got'):
    evaluate_run(run, split='dev')
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(ValueError, match='expected a new or empty folder'):
    evaluate_run(run, save_images=tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
  monkeypatch.setattr(evaluate.jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='single process, got 2'):
    evaluate_run(run, save_images=tmp_path / 'new')


def test_an_export_measures_the_images_it_is_given(
  measured, exported, image_folder, no_figures, tmp_path
):
  with pytest.raises(ValueError, match='expected --input=IMAGES: an export'):
    evaluate_run(exported)
  images = image_folder / 'test'
  result = evaluate_run(exported, images=str(images), output=tmp_path / 'x')
  np.testing.assert_allclose(result['mse'], measured['mse'], rtol=1e-5)
  stored = json.loads((tmp_path / 'x/input/metrics.json').read_text())
  assert stored['data'] == str(images)
  both = str(image_folder)
  result = evaluate_run(exported, images=both, split='validation')
  assert result['images'] == 12
  with pytest.raises(ValueError, match='expected a new or empty folder'):
    evaluate_run(exported, images=both, output=tmp_path / 'x')


def test_what_cannot_be_written_ends_before_the_work(run, monkeypatch):
  monkeypatch.setattr(evaluate, '_measure', None)
  with pytest.raises(ValueError, match='--output=FOLDER for .* hf:me/tiny'):
    evaluate_run('hf:me/tiny')
  monkeypatch.setattr(evaluate.os, 'access', lambda *_: False)
  with pytest.raises(ValueError, match='evaluation/test: Permission denied'):
    evaluate_run(run)


@pytest.mark.slow
def test_a_divided_folder_stays_divided_in_resume_and_evaluation(
  tiny_config, image_folder, tmp_path, caplog
):
  data, workdir = tmp_path / 'set', tmp_path / 'run'
  files = sorted(image_folder.rglob('*.png'))
  for i in range(120):
    (data / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
    shutil.copy(files[i % 60], data / 'ab'[i % 2] / f'{i:03d}.png')
  tiny_config.data.name = f'folder:{data}'
  tiny_config.data.split = 'paper'
  tiny_config.eval_every, tiny_config.num_steps = 0, 2
  train(tiny_config, workdir)
  before = evaluate_run(workdir)
  recorded = json.loads((workdir / 'split.json').read_text())
  assert [len(recorded[x]) for x in SPLITS] == [84, 24, 12]
  # By the names alone, an image of each other part would take its place.
  for i in range(40):
    shutil.copy(files[i], data / 'a' / f'new{i}.png')
  assert evaluate_run(workdir)['mse'] == before['mse']
  (data / recorded['train'][0]).unlink()
  tiny_config.num_steps = 3
  train(tiny_config, workdir)
  assert 'missing since the run divided it, and left out: 1 of' in caplog.text
  assert 'new since the run divided it, and left out: 40 of' in caplog.text
  assert json.loads((workdir / 'split.json').read_text()) == recorded


def test_a_workdir_among_the_images_is_refused(tiny_config, image_folder):
  with pytest.raises(ValueError, match='a --workdir outside of the images'):
    train(tiny_config, image_folder / 'runs/x')
  assert not (image_folder / 'runs').exists()


def test_the_table_names_every_metric():
  text = format_table(dict.fromkeys(UNITS, 0.5) | {'images': 10000}, 'title')
  assert text.splitlines()[0] == 'title'
  assert all(name in text for name in UNITS)
  assert '10,000' in text
