"""Image folders, and the metrics of packages that are stood in for here."""

import contextlib
import importlib.metadata
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
from PIL import Image

from rvq_jax.evaluation import perceptual
from rvq_jax.evaluation.perceptual import perceptual_metrics, save_pairs

VALUES = {'frechet_inception_distance': 3.5}
VALUES |= {'inception_score_mean': 9.25, 'inception_score_std': 0.5}


def images(count, seed=0, side=32):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, side, side, 3), np.uint8)


def write(folder, count=12, side=32):
  pairs = images(count, 0, side), images(count, 1, side)
  save_pairs(folder, 0, pairs, np.ones(count, bool))
  return folder


@pytest.fixture
def packages(monkeypatch):
  """Stands in for torch, torch_fidelity and lpips; records the calls."""
  calls = types.SimpleNamespace(values=dict(VALUES), error=None, seen={})

  def calculate_metrics(**arguments):
    if calls.error:
      raise calls.error
    calls.seen |= arguments
    return calls.values

  def lpips(**arguments):
    if calls.error:
      raise calls.error
    distance = lambda x, y: np.abs(x - y).mean((1, 2, 3))  # noqa: E731
    return types.SimpleNamespace(to=lambda device: distance)

  modules = {
    'torch': {
      'cuda': types.SimpleNamespace(is_available=lambda: False),
      'hub': types.SimpleNamespace(get_dir=lambda: '/cache/hub'),
      'inference_mode': contextlib.nullcontext,
      'as_tensor': lambda array, device: array,
    },
    'torch_fidelity': {'calculate_metrics': calculate_metrics},
    'lpips': {'LPIPS': lpips},
  }
  for name, members in modules.items():
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
  versions = {'torch-fidelity': '0.4.0', 'lpips': '0.1.4'}
  monkeypatch.setattr(importlib.metadata, 'version', versions.__getitem__)
  return calls


def test_files_hold_the_valid_images_by_position(tmp_path):
  originals, others = images(8, 0), images(8, 1)
  mask = np.array([1, 0, 1, 1, 1, 0, 1, 0], bool)
  for half in (slice(0, 4), slice(4, 8)):
    pairs = originals[half], others[half]
    save_pairs(tmp_path / 'a', half.start, pairs, mask[half])
  for kind, expected in (('originals', originals), ('reconstructions', others)):
    paths = sorted((tmp_path / 'a' / kind).iterdir())
    want = [f'{i:06d}.png' for i in (0, 2, 3, 4, 6)]
    assert [path.name for path in paths] == want
    for path in paths:
      with Image.open(path) as image:
        np.testing.assert_array_equal(image, expected[int(path.stem)])


def test_numbers_are_those_of_the_packages_beside_their_definition(
  packages, tmp_path
):
  result = perceptual_metrics(write(tmp_path, count=40))
  assert result['rfid'] == 3.5
  assert result['inception_score'] == 9.25
  assert result['inception_score_std'] == 0.5
  error = images(40, 0) / 127.5 - images(40, 1) / 127.5
  np.testing.assert_allclose(result['lpips'], np.abs(error).mean(), rtol=1e-5)
  assert len(result) == 8
  assert '40 reconstructions' in result['rfid_definition']
  assert 'lpips 0.1.4' in result['lpips_definition']


def test_the_originals_are_the_reference(packages, tmp_path):
  perceptual_metrics(write(tmp_path))
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
  assert perceptual_metrics(write(tmp_path)) == {}
  assert [r.levelname for r in caplog.records] == ['WARNING'] * 2
  first, second = (r.getMessage() for r in caplog.records)
  assert 'rfid, inception_score left out' in first and 'lpips' in second
  for line in (first, second):
    assert ' '.join(str(error).split()) in line and '\n' not in line
    assert '/cache/hub/checkpoints' in line


def test_a_number_that_is_not_finite_is_left_out(packages, tmp_path, caplog):
  packages.values['inception_score_std'] = float('nan')
  result = perceptual_metrics(write(tmp_path))
  assert {'rfid', 'lpips'} < set(result) and len(result) == 6
  assert 'inception_score_std left out: it is nan' in caplog.text


@pytest.mark.parametrize(
  ('count', 'side', 'missing', 'reason'),
  [
    (9, 32, 'rfid', 'at least 10 images, got 9'),
    (12, 30, 'lpips', 'sides of at least 31 pixels, got 30'),
  ],
)
def test_too_few_or_small_images_are_no_metric(
  count, side, missing, reason, packages, tmp_path, caplog
):
  result = perceptual_metrics(write(tmp_path, count, side))
  assert missing not in result and len(result) > 0
  assert reason in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize('name', ['torch', 'torch_fidelity', 'lpips'])
def test_a_missing_package_is_asked_for_in_one_line(
  name, packages, monkeypatch
):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError) as error:
    perceptual.import_packages()
  assert 'pip install "rvq_jax[eval]"' in str(error.value)
  assert name in str(error.value) and '\n' not in str(error.value)


def test_the_extra_is_imported_when_asked_for_alone():
  program = 'import sys, rvq_jax.evaluation.evaluate; print(*sys.modules)'
  names = subprocess.check_output([sys.executable, '-c', program], text=True)
  assert not {'torch', 'torch_fidelity', 'lpips'} & set(names.split())
