"""Evaluation of a run over a split."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line
from PIL import Image

from rvq_jax import VectorQuantizer, load, metrics, sharding
from rvq_jax.data import loaders
from rvq_jax.data.sources import SPLITS
from rvq_jax.evaluation import evaluate, perceptual
from rvq_jax.evaluation.evaluate import evaluate_run, format_table
from rvq_jax.metrics import to_float
from rvq_jax.tokenizer import export
from rvq_jax.training.build import RunData
from rvq_jax.training.loop import train
from rvq_jax.training.validation import UNITS

pytestmark = pytest.mark.usefixtures('one_device')


def stored(folder):
  return json.loads((folder / 'metrics.json').read_text())


@pytest.fixture
def measured(run):
  """The metrics of the test split, from `evaluate_run`."""
  return stored(run / 'evaluation/test')


@pytest.fixture
def no_figures(monkeypatch):
  monkeypatch.setattr(evaluate, '_draw', lambda *_: None)


def shown(images):
  return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def test_metrics_are_those_of_the_tokenizer_over_the_whole_split(
  run, measured, test_images
):
  assert set(UNITS) < set(measured)
  assert (measured['images'], measured['tokens']) == (11, 11 * 16)
  ids = np.asarray(load(run).encode(test_images))
  output = np.asarray(load(run).decode(ids))
  error = ((output - (test_images / 127.5 - 1)) ** 2).mean()
  levels = ((shown(output).astype(float) - test_images) ** 2).mean((1, 2, 3))
  p = np.bincount(ids.reshape(-1), minlength=16) / ids.size
  similarity = metrics.ssim(output, to_float(test_images)).mean()
  for name, value, tolerance in (
    ('mse', error, 1e-4),
    ('mse_01', error / 4, 1e-4),
    ('psnr', (10 * np.log10(255**2 / levels)).mean(), 1e-4),
    ('ssim', similarity, 1e-3),
    ('perplexity', np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), 1e-6),
    ('usage', (p > 0).mean(), 0),
    ('bits_per_image', 16 * 4, 0),
  ):
    np.testing.assert_allclose(measured[name], value, rtol=tolerance)


def test_choosing_a_step_on_the_images_is_said(
  run, measured, no_figures, tmp_path, caplog
):
  evaluate_run(run, split='validation', step='best', output=tmp_path)
  assert "validation chose 'best' on these images" in caplog.text
  assert stored(tmp_path / 'validation')['chosen_on_these_images']
  assert not measured['chosen_on_these_images']


def test_the_round_trip_is_compared_with_the_forward_pass(
  run, measured, no_figures, monkeypatch
):
  assert measured['roundtrip_error'] == 0
  real = VectorQuantizer.codes_from_ids
  monkeypatch.setattr(
    VectorQuantizer, 'codes_from_ids', lambda self, ids: real(self, ids + 1)
  )
  assert evaluate_run(run)['roundtrip_error'] > 1e-3
  assert stored(run / 'evaluation/test')['roundtrip_error'] > 1e-3
  monkeypatch.setattr(
    VectorQuantizer,
    'codes_from_ids',
    lambda self, ids: np.nan * real(self, ids),
  )
  assert np.isnan(evaluate_run(run)['roundtrip_error'])


def test_devices_need_not_divide_the_batch(
  run, measured, no_figures, monkeypatch
):
  mesh = sharding.data_mesh(jax.devices()[:3])
  monkeypatch.setattr(evaluate.sharding, 'data_mesh', lambda: mesh)
  got = evaluate_run(run)
  for name in UNITS:
    np.testing.assert_allclose(got[name], measured[name], rtol=1e-4)


@pytest.mark.parametrize('output', [None, 'mine'])
def test_files_are_written_and_say_what_they_are(run, tmp_path, output):
  output = output and tmp_path / output
  if output:  # a folder of the user, in which the results get one
    output.mkdir()
    (output / 'curves.png').write_text('mine')
  result = evaluate_run(run, split='validation', step=3, output=output)
  folder = (output or run / 'evaluation') / 'validation'
  about = stored(folder)
  assert about['step'] == 3 and about['split'] == 'validation'
  assert not about['chosen_on_these_images'] and about['mse'] == result['mse']
  assert about['data'].startswith('folder:')
  curves = 'curves' if output else '../curves'
  assert not output or (output / 'curves.png').read_text() == 'mine'
  for name in ('reconstructions', 'code_usage', curves):
    with Image.open(folder / f'{name}.png') as image:
      assert min(image.size) > 200
  counts = np.load(folder / 'code_counts.npy', allow_pickle=False)
  assert counts.shape == (16,) and counts.sum() == result['tokens']
  samples = np.asarray(Image.open(folder / 'samples.png'))
  assert samples.shape == (32, 8 * 16, 3)


def test_definitions_stand_beside_the_metrics_of_a_split_read_once(
  run, test_images, no_figures, monkeypatch
):
  read = mock.Mock(side_effect=loaders.eval_batches)
  monkeypatch.setattr(loaders, 'eval_batches', read)
  result = evaluate_run(run, definitions=True)
  definitions = result['definitions']
  assert read.call_count == 1
  assert stored(run / 'evaluation/test')['definitions'] == definitions
  for name in ('usage', 'perplexity'):
    assert definitions['whole_split'][name] == result[name]
  ids = np.asarray(load(run).encode(test_images)).reshape(11, -1)
  batches = [len(set(part.flat)) / 16 for part in (ids[:8], ids[8:])]
  usage = definitions['mean_over_batches']['usage']
  np.testing.assert_allclose(usage, np.mean(batches))


def test_perceptual_metrics_are_stored_and_shown_and_their_images_kept(
  run, test_images, no_figures, monkeypatch, tmp_path
):
  def of_files(folder, functions):
    assert functions == 'loaded' and folder == tmp_path / 'images'
    return {'rfid': 3.5, 'rfid_definition': 'of 11 images'}

  monkeypatch.setattr(perceptual, 'load_metrics', lambda: 'loaded')
  monkeypatch.setattr(perceptual, 'perceptual_metrics', of_files)
  result = evaluate_run(run, perceptual=True, save_images=tmp_path / 'images')
  about = stored(run / 'evaluation/test')
  assert (about['rfid'], about['rfid_definition']) == (3.5, 'of 11 images')
  last = format_table(result, '').splitlines()[-1]
  assert last.split(maxsplit=2) == ['rfid', '3.5000', 'of 11 images']
  originals, reconstructions = (
    np.stack([Image.open(x) for x in sorted(tmp_path.glob(f'*/{kind}/*'))])
    for kind in ('originals', 'reconstructions')
  )
  np.testing.assert_array_equal(originals, test_images)
  output = shown(np.asarray(load(run).reconstruct(test_images)))
  # Another batch size may round another way.
  np.testing.assert_allclose(reconstructions, output, rtol=0, atol=1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'split': 'dev'}, 'one of train, validation, test, got'),
    ({'save_images': '{full}'}, 'save_images: expected a new or empty folder'),
    ({'output': '{full}'}, 'output: expected a new or empty folder'),
    ({'save_images': '{full}/x', 'processes': 2}, 'a single process, got 2'),
    ({'workdir': 'hf:me/tiny'}, 'output: expected a folder .* of hf:me/tiny'),
  ],
)
def test_wrong_requests_end_before_the_work(
  run, monkeypatch, tmp_path, arguments, message
):
  (tmp_path / 'test').mkdir()
  (tmp_path / 'test/mine.txt').write_text('mine')
  processes = arguments.pop('processes', 1)
  monkeypatch.setattr(evaluate, 'load', None)
  monkeypatch.setattr(evaluate.jax, 'process_count', lambda: processes)
  named = {n: x.format(full=tmp_path) for n, x in arguments.items()}
  with one_line(message):
    evaluate_run(**{'workdir': run} | named)
  assert [x.name for x in tmp_path.rglob('*')] == ['test', 'mine.txt']


def test_a_folder_that_cannot_be_written_ends_before_the_work(run, monkeypatch):
  denied = mock.Mock(side_effect=PermissionError(13, 'Permission denied'))
  monkeypatch.setattr(tempfile, 'TemporaryFile', denied)
  monkeypatch.setattr(evaluate, 'load', None)
  with one_line('output: cannot write to .*evaluation/test: Permission denied'):
    evaluate_run(run)


@pytest.mark.parametrize('name', ['output', 'save_images'])
def test_a_full_disk_is_named_by_its_folder(run, tmp_path, monkeypatch, name):
  full, save = OSError(28, 'No space left on device'), Image.Image.save

  def write(image, path, *rest, **options):
    if tmp_path / name in Path(path).parents:
      raise full
    save(image, path, *rest, **options)

  monkeypatch.setattr(Image.Image, 'save', write)
  folders = {x: tmp_path / x for x in ('output', 'save_images')}
  with one_line(f'left while writing to {tmp_path}/{name}', OSError):
    evaluate_run(run, **folders)


def test_results_of_another_program_are_not_replaced(tmp_path):
  (tmp_path / 'evaluation/test').mkdir(parents=True)
  (tmp_path / 'evaluation/test/metrics.json').write_text('{"loss": 1}')
  with one_line('output: expected a new or empty folder, or one that this'):
    evaluate_run(tmp_path)


@pytest.mark.parametrize('given', [True, False])  # else those of the run
@pytest.mark.parametrize('name', ['output', 'save_images'])
def test_results_do_not_go_among_the_images(
  run, image_folder, monkeypatch, name, given
):
  monkeypatch.setattr(evaluate, '_measure', None)
  images = {'images': str(image_folder)} if given else {}
  with one_line(f'expected {name} outside the images in {image_folder}'):
    evaluate_run(run, **images, **{name: image_folder / 'new'})
  assert not (image_folder / 'new').exists()


def test_an_export_measures_the_images_it_is_given(
  measured, exported, image_folder, no_figures, tmp_path
):
  with one_line('images: expected .* an export does not'):
    evaluate_run(exported)
  images = image_folder / 'test'
  result = evaluate_run(exported, images=str(images), output=tmp_path)
  np.testing.assert_allclose(result['mse'], measured['mse'], rtol=1e-5)
  [folder] = tmp_path.glob('test-????????')
  assert stored(folder)['data'] == str(images)
  result = evaluate_run(exported, images=str(image_folder), split='validation')
  assert result['images'] == 12


def test_each_input_has_results_of_its_own(
  run, image_folder, no_figures, tmp_path, monkeypatch
):
  for name in ('a/set', 'b/set'):
    shutil.copytree(image_folder / 'test', tmp_path / name)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(evaluate, '_measure', lambda *_: ({}, np.zeros(1)))
  before = {*(run / 'evaluation').iterdir()}
  for images in ('a/set', f'{tmp_path}/a/../a/set/', 'b/set'):
    evaluate_run(run, images=images)
  for split in ('test', 'validation'):
    evaluate_run(run, images=str(image_folder), split=split)
  about = [stored(x) for x in {*(run / 'evaluation').iterdir()} - before]
  assert sorted((x['data'], x['split']) for x in about) == sorted(
    [(f'{tmp_path}/{x}/set', 'all') for x in 'ab']
    + [(str(image_folder), x) for x in ('test', 'validation')]
  )
  card = export._results(run, tmp_path, 6)
  assert re.findall(r'\| (\S+) split \|', card) == ['test']  # of the run only


def test_images_of_a_run_that_were_moved_are_measured(
  run, image_folder, measured, no_figures, tmp_path
):
  moved = shutil.copytree(image_folder, tmp_path / 'moved')
  result = evaluate_run(run, data_dir=str(moved))
  assert result['mse'] == measured['mse']
  data = RunData({'data.name': 'folder:/no', 'data.split': 'official'})
  with one_line('/no: No such file .*; name the present folder .* --data_dir'):
    data.open_dataset('split.json')
  for path in moved.glob('test/*/*'):
    Image.new('RGB', (20, 16)).save(path)
  with one_line('11 of .* images of the run are missing or changed'):
    evaluate_run(run, data_dir=str(moved))


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
  # By the names only, an image of each other part would take its place.
  for i in range(40):
    shutil.copy(files[i], data / 'a' / f'new{i}.png')
  assert evaluate_run(workdir)['mse'] == before['mse']
  (data / recorded['train'][0]).unlink()
  tiny_config.num_steps = 3
  train(tiny_config, workdir)
  assert 'missing since the start of the run, and skipped: 1 of' in caplog.text
  assert json.loads((workdir / 'split.json').read_text()) == recorded


def test_a_workdir_among_the_images_is_refused(tiny_config, image_folder):
  with one_line('expected --workdir outside the images'):
    train(tiny_config, image_folder / 'runs/x')
  assert not (image_folder / 'runs').exists()


def test_the_table_names_every_metric():
  text = format_table(dict.fromkeys(UNITS, 0.5) | {'images': 10000}, 'title')
  assert text.startswith('title\n') and '10,000' in text
  assert all(name in text for name in UNITS)
