"""The discriminator for adversarial training: rates how real patches look."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.layers import Norm


class Discriminator(nn.Module):
  """Images [B, h, w, 3] to a map of logits, high where a patch looks real.

  A PatchGAN (Isola et al. 2017, arXiv:1611.07004) with strided 4x4
  convolutions. The first sees the finest detail, the others read a blurred map
  (Zhang 2019, arXiv:1904.11486). GroupNorm has no batch statistics, so real and
  generated images do not affect each other. Four stages see patches of 106
  pixels; images under 64 pixels get fewer stages, for 4x4 logits.

  Attributes:
    widths: channels of the stages.
    dtype: compute dtype; parameters, statistics and logits are float32.
  """

  widths: tuple[int, ...] = (64, 128, 256, 512)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits [B, H, W], float32, of images x [B, h, w, 3] in [-1, 1]."""
    stages = max(min(x.shape[1:3]).bit_length() - 3, 1)
    x = x.astype(self.dtype)
    for i, width in enumerate(self.widths[:stages]):
      x = blur(x) if i else x
      bias = i == 0  # the others have GroupNorm's
      options = {'use_bias': bias, 'dtype': self.dtype}
      x = nn.Conv(width, (4, 4), 2, name=f'conv{i}', **options)(x)
      if i:
        norm = Norm(self.dtype, kind='group', name=f'norm{i}')
        x = norm(x, train=False)
      x = nn.leaky_relu(x, 0.2)
    x = nn.Conv(1, (3, 3), dtype=self.dtype, name='out')(x)
    return x[..., 0].astype(jnp.float32)


def blur(x: jax.Array) -> jax.Array:
  """x [B, h, w, C] filtered by [1, 2, 1] / 4 along h and w; edges repeat."""
  for axis in (1, 2):
    pads = [(int(i == axis),) * 2 for i in range(4)]
    padded = jnp.pad(x, pads, 'edge')
    before, after = (
      jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
      for i in (0, 2)
    )
    x = (before + 2 * x + after) / 4
  return x
