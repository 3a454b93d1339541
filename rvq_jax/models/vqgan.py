"""The network of the VQGAN family (Esser et al. 2021, arXiv:2012.09841).

taming-transformers, latent diffusion, LlamaGen, VAR, IBQ and diffusers'
`VQModel` share it: GroupNorm before each convolution, swish, attention of one
head, strided and nearest-neighbour resampling. `tokenizer.layouts` maps their
weights to it.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.layers import SelfAttention, Upsample
from rvq_jax.quantize.fields import check, field


class GroupNorm(nn.Module):
  """GroupNorm of x; with codes, their 1x1 convolutions scale and shift it.

  The form with codes is MoVQ's (Zheng et al. 2022, arXiv:2209.09002).
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, codes: jax.Array | None = None) -> jax.Array:
    """Maps x [B, H, W, C] to its shape; codes are [B, h, w, D]."""
    channels, options = x.shape[-1], {'dtype': self.dtype}
    groups = math.gcd(32, channels)
    y = nn.GroupNorm(groups, epsilon=1e-6, name='norm', **options)(x)
    if codes is None:
      return y
    zoom = x.shape[1] // codes.shape[1]

    def of_codes(name):
      z = nn.Conv(channels, (1, 1), name=name, **options)(codes)
      return z.repeat(zoom, 1).repeat(zoom, 2)

    return y * of_codes('scale') + of_codes('shift')


class Block(nn.Module):
  """shortcut(x) + conv(swish(norm(conv(swish(norm(x)))))).

  The second convolution starts at 0, so that a block starts as its shortcut.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, codes: jax.Array | None = None) -> jax.Array:
    """Maps x [B, H, W, C] to [B, H, W, features]; for codes see `GroupNorm`."""
    y = x
    starts = nn.initializers.lecun_normal(), nn.initializers.zeros
    for i, start in enumerate(starts, 1):
      y = nn.swish(GroupNorm(self.dtype, name=f'norm{i}')(y, codes))
      options = {'dtype': self.dtype, 'kernel_init': start}
      y = nn.Conv(self.features, (3, 3), name=f'conv{i}', **options)(y)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name='shortcut')(x)
    return x + y


class VQGANCoder(nn.Module):
  """The fields and layers that `VQGANEncoder` and `VQGANDecoder` share.

  Attributes:
    ch: channels at full resolution; 128 in most published weights.
    ch_mult: channels of each level, as multiples of ch; each level but the
      first has half the resolution.
    factor: image side over latent side, 2^(levels - 1).
    num_res_blocks: per level of the encoder; the decoder has one more.
    attn_levels: levels with attention after each block, from 1, the image's
      resolution; None: none.
    mid_attention: attention in the middle.
    z_channels: channels between the network and the convolution to the codes.
    quant_kernel: side of that convolution, to and from the codes.
    movq: the decoder's norms depend on the codes (MoVQ).
    unit_range: the network's own images are in [0, 1].
    dtype: compute dtype; parameters and statistics are float32.
    remat: recompute the inside of each block in the backward pass.
  """

  ch: int = field(128, 1, 2**16)
  ch_mult: tuple[int, ...] = field((1, 1, 2, 2, 4))
  factor: int = field(8, choices=(2, 4, 8, 16, 32, 64))
  num_res_blocks: int = field(6, 0, 1000)
  attn_levels: tuple[int, ...] | None = field(None)
  mid_attention: bool = field(True)
  z_channels: int = field(256, 1, 2**20)
  quant_kernel: int = field(1, choices=(1, 3))
  movq: bool = field(False)
  unit_range: bool = field(False)
  dtype: Any = jnp.float32
  remat: bool = field(False)

  def channels(self) -> list[int]:
    """Channels of each level; ValueError if a field is outside its range."""
    check(self)
    levels = len(self.ch_mult)
    if self.factor != 2 ** (levels - 1):
      raise ValueError(
        f'factor: expected {2 ** (levels - 1)} for the {levels} levels of '
        f'ch_mult, got {self.factor}'
      )
    if max(self.attn_levels or [1]) > levels:
      raise ValueError(
        f'attn_levels: expected levels from 1 to {levels}, got '
        f'{self.attn_levels}'
      )
    return [self.ch * m for m in self.ch_mult]

  norm = 'group'  # as `Coder` calls it

  @property
  def reach(self) -> int:
    """At most so many latent positions to each side influence one position.

    A level reaches half as far as the level below it; the middle is two blocks.
    """
    return 4 * (self.num_res_blocks + 1) + 4 + 4

  def _conv(self, x, features, name, kernel=3) -> jax.Array:
    return nn.Conv(features, (kernel, kernel), dtype=self.dtype, name=name)(x)

  def _block(self, x, features, name, codes=None) -> jax.Array:
    cls = nn.remat(Block) if self.remat else Block
    return cls(features, self.dtype, name=name)(x, codes)

  def _attention(self, x, name, codes=None) -> jax.Array:
    """x plus attention of one head over its norm."""
    y = GroupNorm(self.dtype, name=f'{name}_norm')(x, codes)
    return x + SelfAttention(1, self.dtype, normed=True, name=name)(y)

  def _level(self, x, i, features, blocks, codes=None) -> jax.Array:
    """The blocks of level i, and their attention."""
    for j in range(blocks):
      x = self._block(x, features, f'level{i}_block{j}', codes)
      if i + 1 in (self.attn_levels or ()):
        x = self._attention(x, f'level{i}_attn{j}', codes)
    return x

  def _middle(self, x, codes=None) -> jax.Array:
    x = self._block(x, x.shape[-1], 'mid_block1', codes)
    if self.mid_attention:
      x = self._attention(x, 'mid_attn', codes)
    return self._block(x, x.shape[-1], 'mid_block2', codes)

  def _out(self, x, features, codes=None) -> jax.Array:
    x = nn.swish(GroupNorm(self.dtype, name='norm_out')(x, codes))
    return self._conv(x, features, 'conv_out')


class VQGANEncoder(VQGANCoder):
  """Images [B, h, w, 3] to latents z [B, h/factor, w/factor, code_dim].

  Attributes:
    code_dim: D, after the convolution to the codes. For the others see
      `VQGANCoder`.
  """

  code_dim: int = field(256, 1, 2**20)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Encodes images x in [-1, 1]; ValueError if a field is out of range."""
    del train  # training changes no layer
    widths, x = self.channels(), x.astype(self.dtype)
    x = self._conv((x + 1) / 2 if self.unit_range else x, self.ch, 'conv_in')
    for i, features in enumerate(widths):
      x = self._level(x, i, features, self.num_res_blocks)
      if i < len(widths) - 1:
        pads, options = ((0, 1), (0, 1)), {'dtype': self.dtype}
        name = f'level{i}_down'
        x = nn.Conv(features, (3, 3), 2, pads, name=name, **options)(x)
    x = self._out(self._middle(x), self.z_channels)
    return self._conv(x, self.code_dim, 'quant_conv', self.quant_kernel)


class VQGANDecoder(VQGANCoder):
  """Latents [B, H, W, D] to images [B, factor H, factor W, 3].

  The mirror of `VQGANEncoder`, with its level numbers: 0 is the last level.
  """

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Decodes latents; images are float32 in [-1, 1], in training not clipped.

    Raises:
      ValueError: a field is outside its range.
    """
    widths, x = self.channels(), x.astype(self.dtype)
    codes = x if self.movq else None
    x = self._conv(x, self.z_channels, 'post_quant_conv', self.quant_kernel)
    x = self._middle(self._conv(x, widths[-1], 'conv_in'), codes)
    for i, features in reversed(list(enumerate(widths))):
      x = self._level(x, i, features, self.num_res_blocks + 1, codes)
      if i:
        x = Upsample(features, self.dtype, 3, name=f'level{i}_up')(x)
    x = self._out(x, 3, codes).astype(jnp.float32)
    x = 2 * x - 1 if self.unit_range else x
    return x if train else jnp.clip(x, -1, 1)  # a clipped value cannot learn
