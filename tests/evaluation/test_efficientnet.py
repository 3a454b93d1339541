"""EfficientNet-Lite0 beside NumPy, and the reader of its distribution."""

import functools
import itertools
import os
import pickle

import jax
import numpy as np
import pytest
from errors import one_line
from PIL import Image
from skimage import data

from rvq_jax.evaluation import efficientnet
from rvq_jax.evaluation.efficientnet import features, load

# Table 1 of Tan and Le 2019 without squeeze-and-excitation, block by block:
# kernel, stride, input, inner and output channels.
BLOCKS = [
  (3, 1, 32, 32, 16),
  *[(3, 2, 16, 96, 24), (3, 1, 24, 144, 24)],
  *[(5, 2, 24, 144, 40), (5, 1, 40, 240, 40)],
  *[(3, 2, 40, 240, 80), *2 * [(3, 1, 80, 480, 80)]],
  *[(5, 1, 80, 480, 112), *2 * [(5, 1, 112, 672, 112)]],
  *[(5, 2, 112, 672, 192), *3 * [(5, 1, 192, 1152, 192)]],
  (3, 1, 192, 1152, 320),
]


def make_layers():
  """Kernel, scale, offset, mean and variance of each of 49 convolutions."""
  kernels = [(3, 3, 3, 32)]
  for size, _, inputs, inner, outputs in BLOCKS:
    kernels += [(1, 1, inputs, inner)] if inner > inputs else []
    kernels += [(size, size, 1, inner), (1, 1, inner, outputs)]
  rng, layers = np.random.default_rng(0), []
  for shape in [*kernels, (1, 1, 320, 1280)]:
    layer = [rng.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape)]
    layer += [rng.normal(mean, 0.1, shape[3]) for mean in (1, 0, 0)]
    layer += [rng.uniform(0.5, 1.5, shape[3])]
    layers.append([array.astype(np.float32) for array in layer])
  return layers


def make_file(layers, *others):
  """As PyTorch wrote it before 1.6: five pickles, then the buffers."""
  names, buffers = [], {}
  for array in itertools.chain(*([*layer, np.int64(7)] for layer in layers)):
    key = str(10**6 - len(names))
    names.append(('name', 'storage', key, 'cpu'))
    buffers[key] = np.size(array).to_bytes(8, 'little') + array.tobytes()
  keys = sorted(buffers)
  heads = 'magic', 1001, {'little_endian': True}, [names, *others], keys
  content = b''.join(pickle.dumps(head, 2) for head in heads)
  return content + b''.join(buffers[key] for key in keys)


@pytest.fixture
def install(monkeypatch, tmp_path):
  """Returns a function: content -> path of the weights, which are trusted."""

  def make(content, trusted=True):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    monkeypatch.setattr(efficientnet, 'installed_file', lambda *_: path)
    if trusted:
      monkeypatch.setattr(efficientnet, 'check_digest', lambda *_: None)
    return path

  return make


def oracle(layers, x):
  layers = iter(layers)

  def convolve(x, stride=1):
    kernel, scale, offset, mean, variance = map(np.float64, next(layers))
    size, side = len(kernel), len(x)
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    pad = total // 2, total - total // 2
    x = np.pad(x, [pad, pad, (0, 0)])
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))
    view = view[::stride, ::stride]
    if kernel.shape[2] == 1:
      x = np.einsum('hwfij,ijf->hwf', view, kernel[:, :, 0])
    else:
      x = np.tensordot(view, kernel, ([3, 4, 2], [0, 1, 2]))
    return (x - mean) / np.sqrt(variance + 1e-3) * scale + offset

  relu6 = functools.partial(np.clip, a_min=0, a_max=6)
  x = relu6(convolve((x.astype(np.float64) - 127) / 128, 2))
  for _, stride, inputs, inner, outputs in BLOCKS:
    y = relu6(convolve(x)) if inner != inputs else x
    y = convolve(relu6(convolve(y, stride)))
    x = x + y if stride == 1 and inputs == outputs else y
  return relu6(convolve(x)).mean((0, 1))


@pytest.mark.parametrize('side', [64, 300])
def test_features_are_those_of_the_definition(side, install):
  layers = make_layers()
  install(make_file(layers))
  image = np.random.default_rng(1).uniform(0, 255, (side, side, 3))
  image = image.astype(np.float32)
  planes = map(Image.fromarray, np.moveaxis(image, -1, 0))
  resized = [x.resize((224, 224), Image.BILINEAR) for x in planes]
  expected = oracle(layers, np.stack(resized, -1))
  got = jax.jit(features)(load(), image[None] / 127.5 - 1)
  assert got.shape == (1, 1280) and expected.std() > 0.1
  np.testing.assert_allclose(got[0], expected, rtol=0, atol=1e-3)


def test_instructions_of_a_pickle_are_not_executed(install, tmp_path):
  class Malicious:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'executed'),)

  install(make_file(make_layers(), Malicious()))
  assert len(load()) == 49
  assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('content', [b'', b'no pickle', make_file([])])
def test_other_content_is_refused_in_one_line(content, install):
  path = install(content, trusted=False)
  with one_line(f'{path}: expected weights'):
    load()


# efficientnet-lite-pytorch 0.1.0 in PyTorch 2.13.
@pytest.mark.slow
def test_photographs_have_the_features_of_the_reference():
  try:
    weights = load()
  except ImportError as error:
    pytest.skip(str(error))
  names = 'astronaut', 'chelsea', 'coffee', 'rocket'
  x = np.stack([getattr(data, name)()[20:244, 60:284] for name in names])
  got = jax.jit(features)(weights, x / np.float32(127.5) - 1)
  sums = [365.1954, 179.35, 192.1722, 230.341]
  maxima = [2.48803, 4.042188, 2.491815, 2.812504]
  np.testing.assert_allclose(got.sum(1), sums, rtol=1e-5)
  np.testing.assert_allclose(got.max(1), maxima, rtol=1e-5)
