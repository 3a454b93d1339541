"""The encoder: strided convolutions, then residual blocks (paper 3.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.layers import ACTIVATIONS, Norm, residual_blocks


def stage_plan(widths, factor: int) -> tuple[tuple[int, int], ...]:
  """(channels, stride) of each convolution of the encoder.

  One convolution per width; the first log2(factor) of them have stride 2, the
  rest stride 1. A factor above 2^len(widths) repeats the last width.

  Args:
    widths: channels of the convolutions, the paper's (64, 128, 256).
    factor: image side over latent side, a power of two.

  Raises:
    ValueError: factor is not a power of two from 2 to 64, or widths is empty.
  """
  if factor not in (2, 4, 8, 16, 32, 64):
    raise ValueError(
      f'factor: expected a power of two from 2 to 64, got {factor!r}'
    )
  widths = tuple(widths)
  if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
    raise ValueError(f'widths: expected integers > 0, got {widths!r}')
  halvings = factor.bit_length() - 1
  widths += widths[-1:] * (halvings - len(widths))
  return tuple((w, 2 if i < halvings else 1) for i, w in enumerate(widths))


class Encoder(nn.Module):
  """Images [B, h, w, 3] to latents z [B, h/factor, w/factor, code_dim].

  Attributes:
    widths: channels of the convolutions.
    factor: image side over latent side.
    num_res_blocks: residual blocks at the last width.
    code_dim: D. A 1x1 convolution without activation ends the encoder, so that
      z is signed.
    dtype: compute dtype; parameters and statistics are float32.
    axis_name: see `Norm`.
    remat: see `residual_blocks`.
    norm: `Norm.kind`.
    activation: a name in `layers.ACTIVATIONS`.
  """

  widths: tuple[int, ...] = (64, 128, 256)
  factor: int = 8
  num_res_blocks: int = 6
  code_dim: int = 256
  dtype: Any = jnp.float32
  axis_name: Any = None
  remat: bool = False
  norm: str = 'batch'
  activation: str = 'leaky_relu'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Encodes images x [B, h, w, 3] in [-1, 1]."""
    x = x.astype(self.dtype)
    for i, (width, stride) in enumerate(stage_plan(self.widths, self.factor)):
      x = nn.Conv(
        width,
        (3, 3),
        (stride, stride),
        use_bias=False,
        dtype=self.dtype,
        name=f'conv{i}',
      )(x)
      x = Norm(self.dtype, self.axis_name, self.norm, name=f'norm{i}')(
        x, train=train
      )
      x = ACTIVATIONS[self.activation](x)
    x = residual_blocks(self, x, train)
    return nn.Conv(self.code_dim, (1, 1), dtype=self.dtype, name='out')(x)
