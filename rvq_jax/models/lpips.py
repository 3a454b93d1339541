"""LPIPS v0.1, the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924).

The weights are a dict of arrays, see `lpips_weights.load`: kernel_NN
[k, k, C, F] and bias_NN [F] per convolution, head_N [F] per compared feature
map. Pass them to a jitted function as an argument: XLA would take minutes to
fold constants into the convolutions.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rvq_jax.metrics import prepare_images

MIN_SIDE = 32
# From [-1, 1] to the networks' training inputs.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 1, 1, 3)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 1, 1, 3)
_EPS = 1e-10
# Convolutions after a max pooling of stride 2, its window, and the compared
# convolutions, the last of them at the end; each has a ReLU.
_VGG16 = (2, 4, 7, 10), 2, (1, 3, 6, 9, 12)
_ALEXNET = (1, 2), 3, (0, 1, 2, 3, 4)


def distance(weights, x, y, *, dtype=jnp.float32) -> jax.Array:
  """LPIPS of pairs of images: 0 for equal images; lower is better.

  With f^l the output of compared layer l, scaled to unit length per position,
  and w^l >= 0 its head:

      d(x, y) = sum_l mean_hw sum_c w^l_c (f^l_c(x) - f^l_c(y))^2

  Args:
    weights: dict of arrays, for VGG16 or AlexNet.
    x: [B, h, w, 3], uint8 or float in [-1, 1].
    y: like x.
    dtype: dtype of the convolutions; the rest is float32.

  Returns:
    float32 [B], differentiable in x and y.

  Raises:
    ValueError: the shapes differ, a side is under `MIN_SIDE`, or the dtype is
      wrong.
  """
  x, y = prepare_images(x), prepare_images(y)
  if x.shape != y.shape or x.ndim != 4 or min(x.shape[1:3]) < MIN_SIDE:
    raise ValueError(
      'LPIPS: expected two batches of images [B, h, w, 3] with sides of at '
      f'least {MIN_SIDE} pixels, got {x.shape} and {y.shape}'
    )
  # In two passes, an image without a gradient needs no backward pass.
  of_x, of_y = (_features(weights, image, dtype) for image in (x, y))
  total = jnp.zeros(len(x))
  for layer, (a, b) in enumerate(zip(of_x, of_y, strict=True)):
    squares = (_unit_length(a) - _unit_length(b)) ** 2
    head = weights[f'head_{layer}'].reshape(1, 1, 1, -1)
    total += (squares * head).sum(-1).mean((1, 2))
  return total


def _features(weights, image, dtype) -> Iterator[jax.Array]:
  """The compared feature maps [B, H, W, F] of these weights' network."""
  pools, side, compared = _VGG16 if 'kernel_12' in weights else _ALEXNET
  x = ((image - _SHIFT) / _SCALE).astype(dtype)
  for i in range(compared[-1] + 1):
    if i in pools:
      x = _halve(x) if side == 2 else _pool(x, side)
    kernel = weights[f'kernel_{i:02d}']
    stride, padding = (4, 2) if len(kernel) == 11 else (1, len(kernel) // 2)
    x = lax.conv_general_dilated(
      x,
      kernel.astype(dtype),
      (stride, stride),
      2 * [(padding, padding)],
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=lax.Precision.HIGHEST,  # float32, not TF32
    )
    bias = weights[f'bias_{i:02d}'].reshape(1, 1, 1, -1)
    x = jax.nn.relu(x + bias.astype(dtype))
    if i in compared:
      yield x


def _pool(x, side):
  window, strides = (1, side, side, 1), (1, 2, 2, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, 'VALID')


def _halve(x):
  """`_pool(x, 2)`, whose gradient takes 20 to 40 times as long on a CPU.

  As there, the first of equal values has the gradient.
  """
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
  top, *others = (x[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
  for other in others:
    top = jnp.where(top >= other, top, other)
  return top


def _unit_length(x):
  """Vectors over their norm; at a norm of 0 the gradient stays finite."""
  x = x.astype(jnp.float32)
  squares = (x**2).sum(-1, keepdims=True)
  return x / (jnp.sqrt(jnp.where(squares > 0, squares, 1)) + _EPS)
