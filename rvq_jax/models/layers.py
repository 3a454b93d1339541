"""Blocks that encoder and decoder share. Feature maps are [B, H, W, C]."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Norm(nn.Module):
  """BatchNorm with float32 parameters and statistics.

  Attributes:
    dtype: dtype of the output.
    axis_name: mapped axis to take the statistics over; under `jit` with
      shardings they are global without one.
    zero_scale: start with scale 0 rather than 1.
  """

  dtype: Any = jnp.float32
  axis_name: Any = None
  zero_scale: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalises x [B, H, W, C]; with train=True writes 'batch_stats'."""
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name=None if self.is_initializing() else self.axis_name,
      scale_init=nn.initializers.constant(0.0 if self.zero_scale else 1.0),
      name='bn',
    )(x)


class ResidualBlock(nn.Module):
  """leaky(x + norm(conv(leaky(norm(conv(x)))))), 3x3 convolutions.

  The second norm starts at scale 0, so that a block starts as the identity
  (Goyal et al. 2017, arXiv:1706.02677): twelve blocks that start with scale 1
  take several times as many steps to the same error; see docs/results.md.

  Attributes:
    dtype: compute dtype.
    axis_name: see `Norm`.
  """

  dtype: Any = jnp.float32
  axis_name: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps x [B, H, W, C] to the same shape."""
    y = x
    for i in range(2):
      y = nn.Conv(
        x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype, name=f'conv{i}'
      )(y)
      y = Norm(self.dtype, self.axis_name, i == 1, name=f'norm{i}')(
        y, train=train
      )
      y = nn.leaky_relu(y if i == 0 else x + y)
    return y


class SelfAttention(nn.Module):
  """x + attention(layer_norm(x)) over all H W positions (paper 3.3).

  Attributes:
    num_heads: heads; must divide the channels.
    dtype: compute dtype; the softmax is float32.
  """

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, H, W, C] to the same shape."""
    batch, height, width, channels = x.shape
    if channels % self.num_heads:
      raise ValueError(
        f'expected num_heads to divide the {channels} channels, got '
        f'{self.num_heads}'
      )
    y = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
    y = y.reshape(batch, height * width, channels)
    heads = (self.num_heads, channels // self.num_heads)
    query, key, value = (
      nn.DenseGeneral(heads, dtype=self.dtype, name=name)(y)
      for name in ('query', 'key', 'value')
    )
    y = jax.nn.dot_product_attention(query, key, value)
    y = nn.DenseGeneral(channels, (-2, -1), dtype=self.dtype, name='out')(y)
    return x + y.reshape(x.shape)


class Upsample(nn.Module):
  """Transposed convolution, kernel 4, stride 2: [B, H, W, C] to twice H, W.

  The parameters and the values are those of `nn.ConvTranspose(features, (4, 4),
  (2, 2))`. XLA's CPU backend runs that operation many times slower than a
  matrix product, so there it is one product to the 16 taps, which are then
  added where they overlap.

  Attributes:
    features: output channels.
    dtype: compute dtype.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, H, W, C] to [B, 2H, 2W, features]."""
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (4, 4, x.shape[-1], self.features),
      jnp.float32,
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    y = jax.lax.platform_dependent(
      x, kernel, cpu=_upsample_by_matmul, default=_upsample_by_convolution
    )
    return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def _upsample_by_convolution(x, kernel):
  return jax.lax.conv_transpose(
    x,
    kernel,
    strides=(2, 2),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _upsample_by_matmul(x, kernel):
  """Input i adds to outputs 2i - 1 ... 2i + 2, in each direction."""
  batch, height, width, channels = x.shape
  features = kernel.shape[-1]
  taps = jnp.moveaxis(kernel[::-1, ::-1], 2, 0).reshape(channels, -1)
  y = (x.reshape(-1, channels) @ taps).reshape(
    batch, height, width, 4, 4, features
  )
  y = _overlap_add(y, 1, 3)  # [B, 2H, W, 4, features]
  y = _overlap_add(y, 2, 3)  # [B, 2H, 2W, features]
  return y


def _overlap_add(y, axis, tap_axis):
  """Adds the four taps of each input along one direction."""
  tap = [jax.lax.index_in_dim(y, t, tap_axis, keepdims=False) for t in range(4)]

  def shifted(x, by):
    zero = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
    if by > 0:
      parts = [zero, jax.lax.slice_in_dim(x, 0, -1, axis=axis)]
    else:
      parts = [jax.lax.slice_in_dim(x, 1, None, axis=axis), zero]
    return jnp.concatenate(parts, axis)

  even = tap[1] + shifted(tap[3], 1)
  odd = tap[2] + shifted(tap[0], -1)
  y = jnp.stack([even, odd], axis + 1)
  shape = list(even.shape)
  shape[axis] *= 2
  return y.reshape(shape)
