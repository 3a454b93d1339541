"""The decoder: attention, residual blocks, transposed convolutions (3.3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.encoder import stage_plan
from rvq_jax.models.layers import (
  ACTIVATIONS,
  Norm,
  SelfAttention,
  Upsample,
  residual_blocks,
)


class Decoder(nn.Module):
  """Latents [B, H, W, code_dim] to images [B, factor H, factor W, 3].

  The mirror of `Encoder`: a 1x1 convolution in, self-attention on the latent
  grid, residual blocks at the last width, then the stages backwards, each a
  transposed convolution (or a 3x3 convolution where the encoder's stage has
  stride 1), and tanh.

  Attributes:
    num_heads: attention heads. All others are as of `Encoder`.
  """

  widths: tuple[int, ...] = (64, 128, 256)
  factor: int = 8
  num_res_blocks: int = 6
  num_heads: int = 8
  dtype: Any = jnp.float32
  axis_name: Any = None
  remat: bool = False
  norm: str = 'batch'
  activation: str = 'leaky_relu'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Decodes latents; images are float32 in [-1, 1]."""
    stages = stage_plan(self.widths, self.factor)
    x = x.astype(self.dtype)
    x = nn.Conv(stages[-1][0], (1, 1), dtype=self.dtype, name='in')(x)
    x = SelfAttention(self.num_heads, self.dtype, name='attention')(x)
    x = residual_blocks(self, x, train)
    outputs = [width for width, _ in stages[:-1]]
    for i in reversed(range(len(stages))):
      last = i == 0
      features = 3 if last else outputs[i - 1]
      if stages[i][1] == 2:
        x = Upsample(features, self.dtype, name=f'up{i}')(x)
      else:
        x = nn.Conv(features, (3, 3), dtype=self.dtype, name=f'up{i}')(x)
      if not last:
        x = Norm(self.dtype, self.axis_name, self.norm, name=f'norm{i}')(
          x, train=train
        )
        x = ACTIVATIONS[self.activation](x)
    return jnp.tanh(x.astype(jnp.float32))
