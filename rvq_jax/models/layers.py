"""Blocks that encoder and decoder share. Feature maps are [B, H, W, C]."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models import convolutions

NORMS = ('batch', 'group')
ACTIVATIONS = {'leaky_relu': nn.leaky_relu, 'swish': nn.swish}


def num_groups(channels: int) -> int:
  """Groups of GroupNorm: 32, or a quarter of fewer than 128 channels.

  Raises:
    ValueError: the groups do not divide the channels.
  """
  groups = 32 if channels >= 128 else max(channels // 4, 1)
  if channels % groups:
    raise ValueError(
      f'norm: expected channels that the {groups} groups of GroupNorm divide, '
      f"got {channels}; choose other widths or norm='batch'"
    )
  return groups


class Norm(nn.Module):
  """BatchNorm or GroupNorm with float32 parameters and statistics.

  Attributes:
    dtype: dtype of the output.
    axis_name: mapped axis to take batch statistics over; under `jit` with
      shardings they are global without one.
    kind: 'batch', or 'group' (`num_groups`, eps 1e-6) without statistics.
    zero_scale: start with scale 0 rather than 1.
  """

  dtype: Any = jnp.float32
  axis_name: Any = None
  kind: str = 'batch'
  zero_scale: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalises x [B, H, W, C]; BatchNorm in training writes 'batch_stats'."""
    scale = nn.initializers.constant(0.0 if self.zero_scale else 1.0)
    if self.kind == 'group':
      return nn.GroupNorm(
        num_groups(x.shape[-1]),
        epsilon=1e-6,
        dtype=self.dtype,
        scale_init=scale,
        name='gn',
      )(x)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name=None if self.is_initializing() else self.axis_name,
      scale_init=scale,
      name='bn',
    )(x)


class ResidualBlock(nn.Module):
  """act(x + norm(conv(act(norm(conv(x)))))), 3x3 convolutions.

  The second norm starts at scale 0, so that a block starts as the identity
  (Goyal et al. 2017, arXiv:1706.02677): twelve blocks that start at scale 1
  need several times as many steps to the same error; see docs/results.md.

  Attributes:
    norm: `Norm.kind`.
    activation: a name in `ACTIVATIONS`.
    dtype: see `Norm`, as for axis_name.
  """

  dtype: Any = jnp.float32
  axis_name: Any = None
  norm: str = 'batch'
  activation: str = 'leaky_relu'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps x [B, H, W, C] to the same shape."""
    act, y = ACTIVATIONS[self.activation], x
    for i in range(2):
      y = nn.Conv(
        x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype, name=f'conv{i}'
      )(y)
      y = Norm(
        kind=self.norm,
        zero_scale=i == 1,
        dtype=self.dtype,
        axis_name=self.axis_name,
        name=f'norm{i}',
      )(y, train=train)
      y = act(y if i == 0 else x + y)
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
        f'num_heads: expected a divisor of the {channels} channels, the last '
        f'width, got {self.num_heads}'
      )
    y = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
    y = y.reshape(batch, height * width, channels)
    heads = (self.num_heads, channels // self.num_heads)
    query, key, value = (
      nn.DenseGeneral(heads, dtype=self.dtype, name=name)(y)
      for name in ('query', 'key', 'value')
    )
    y = attend(query, key, value)
    y = nn.DenseGeneral(channels, (-2, -1), dtype=self.dtype, name='out')(y)
    return x + y.reshape(x.shape)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(query key^T / sqrt(d)) value, with the scores in float32.

  A GPU of compute capability 8.0 or more runs cuDNN's fused kernel in half
  precision. Everywhere else, if the B H T T scores do not fit into a tile (4
  MiB on CPU, 256 MiB on other devices), a loop attends a few heads at a time
  and computes their scores again in the backward pass.

  All arrays are [B, T, H, d]: H heads of d channels.
  """
  return jax.lax.platform_dependent(
    query,
    key,
    value,
    cpu=functools.partial(_attend_in_tiles, scores=2**20),
    default=_attend_on_accelerator,
  )


def _attend_on_accelerator(query, key, value):
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
  if half and fits and _has_fused_attention():
    return jax.nn.dot_product_attention(
      query, key, value, implementation='cudnn'
    )
  return _attend_in_tiles(query, key, value, scores=2**26)


@functools.cache
def _has_fused_attention() -> bool:
  """Whether this process computes on NVIDIA GPUs with cuDNN's kernel."""
  device = jax.devices()[0]
  capability = getattr(device, 'compute_capability', '')
  known = device.platform == 'gpu' and capability.replace('.', '').isdigit()
  return known and float(capability) >= 8.0


def _attend_in_tiles(query, key, value, *, scores):
  """Attends in tiles of whole heads: at most `scores` scores, or one head.

  Tile i holds the heads i, i + n, i + 2 n ...: the loop never runs over the
  sharded axis, so that each device works on its own images.
  """
  batch, tokens, heads, dim = query.shape
  count = batch * heads
  most = max(1, scores // tokens**2)
  tile = max(n for n in range(1, min(most, count) + 1) if count % n == 0)

  def split(x):
    x = x.transpose(0, 2, 1, 3).reshape(tile, -1, tokens, dim)
    return jnp.moveaxis(x, 1, 0)

  def attend_tile(qkv):
    q, k, v = qkv
    logits = jnp.einsum(
      'nqd,nkd->nqk', q, k, preferred_element_type=jnp.float32
    )
    logits *= dim**-0.5
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1))[..., None])
    # The sum divides after the product: d numbers per query rather than T,
    # forward and in the derivative.
    w = weights.astype(v.dtype)
    y = jnp.einsum('nqk,nkd->nqd', w, v, preferred_element_type=jnp.float32)
    return (y / weights.sum(-1)[..., None]).astype(v.dtype)

  qkv = tuple(split(x) for x in (query, key, value))
  if tile == count:
    y = attend_tile([x[0] for x in qkv])[None]
  else:
    y = jax.lax.map(jax.checkpoint(attend_tile), qkv)
  y = jnp.moveaxis(y, 0, 1).reshape(batch, heads, tokens, dim)
  return y.transpose(0, 2, 1, 3)


class Upsample(nn.Module):
  """`nn.ConvTranspose(features, (4, 4), (2, 2))` by `convolutions.upsample`."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, H, W, C] to [B, 2H, 2W, features]."""
    shape = (4, 4, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    y = convolutions.upsample(x, kernel)
    return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
