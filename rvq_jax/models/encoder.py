"""The encoder: strided convolutions, then residual blocks (paper 3.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.layers import (
  ACTIVATIONS,
  GAINS,
  NORMS,
  Norm,
  ResidualBlock,
)
from rvq_jax.quantize.fields import check, field


def stage_plan(widths, factor: int) -> tuple[tuple[int, int], ...]:
  """(channels, stride) of each convolution of the encoder.

  One convolution per width; the first log2(factor) have stride 2, the rest
  stride 1. A factor above 2^len(widths) repeats the last width.
  """
  halvings, widths = factor.bit_length() - 1, tuple(widths)
  widths += widths[-1:] * (halvings - len(widths))
  return tuple((w, 2 if i < halvings else 1) for i, w in enumerate(widths))


class Coder(nn.Module):
  """The fields and layers that `Encoder` and `Decoder` share.

  Attributes:
    widths: channels of the convolutions, see `stage_plan`.
    factor: image side over latent side, a power of two.
    num_res_blocks: residual blocks at the last width.
    dtype: compute dtype; parameters and statistics are float32.
    axis_name: see `Norm`.
    remat: recompute the inside of each residual block in the backward pass:
      less memory (docs/predictions.md) for a third more operations.
    norm: 'batch'; 'group'; or 'group_blocks': GroupNorm only in the residual
      blocks, since between strided or transposed convolutions it would remove
      brightness and contrast from each image (docs/gradients.md).
    activation: a name in `layers.ACTIVATIONS`.
  """

  widths: tuple[int, ...] = field((64, 128, 256))
  factor: int = field(8, choices=(2, 4, 8, 16, 32, 64))
  num_res_blocks: int = field(6, 0, 1000)
  dtype: Any = jnp.float32
  axis_name: Any = None
  remat: bool = field(False)
  norm: str = field('batch', choices=NORMS)
  activation: str = field('leaky_relu', choices=tuple(ACTIVATIONS))

  def stages(self) -> tuple[tuple[int, int], ...]:
    """The `stage_plan`; ValueError if a field is outside its range."""
    check(self)
    return stage_plan(self.widths, self.factor)

  @property
  def reach(self) -> int:
    """At most so many latent positions to each side influence one position.

    One per 3x3 convolution at latent resolution; all convolutions of higher
    resolution together reach less than two.
    """
    strides = [stride for _, stride in stage_plan(self.widths, self.factor)]
    return 2 * self.num_res_blocks + strides.count(1) + 2

  def norm_and_act(self, x: jax.Array, name: str, train: bool) -> jax.Array:
    """The activation of x after its layer `Norm`, if any, called `name`."""
    if self.norm != 'group_blocks':
      norm = Norm(self.dtype, self.axis_name, self.norm, name=name)
      x = norm(x, train=train)
    return ACTIVATIONS[self.activation](x)

  def stem_init(self, taps: float = 1.0) -> nn.initializers.Initializer:
    """Initialiser of a convolution before `norm_and_act`.

    Without a norm it keeps the variance, like He's for ReLU; `taps` is the
    share of the kernel that acts on one output.
    """
    scale = 1.0
    if self.norm == 'group_blocks':
      scale = GAINS[self.activation] / taps
    return nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')

  def residual_blocks(self, x: jax.Array, train: bool) -> jax.Array:
    """x after the blocks 'block0', 'block1' ..."""
    block = ResidualBlock
    if self.remat:
      block = nn.remat(ResidualBlock, static_argnums=(2,))  # train
    fields = self.dtype, self.axis_name, self.norm, self.activation
    for i in range(self.num_res_blocks):
      x = block(*fields, name=f'block{i}')(x, train)
    return x


class Encoder(Coder):
  """Images [B, h, w, 3] to latents z [B, h/factor, w/factor, code_dim].

  Attributes:
    code_dim: D. A 1x1 convolution without activation ends the encoder, so z is
      signed. For the others see `Coder`.
  """

  code_dim: int = field(256, 1, 2**20)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Encodes images x in [-1, 1]; ValueError for a field outside its range."""
    x, options = x.astype(self.dtype), {'dtype': self.dtype}
    options['use_bias'] = self.norm == 'group_blocks'  # a norm has its own
    options['kernel_init'] = self.stem_init()
    for i, (width, stride) in enumerate(self.stages()):
      x = nn.Conv(width, (3, 3), stride, name=f'conv{i}', **options)(x)
      x = self.norm_and_act(x, f'norm{i}', train)
    x = self.residual_blocks(x, train)
    return nn.Conv(self.code_dim, (1, 1), dtype=self.dtype, name='out')(x)
