"""Blocks that encoder and decoder share. Feature maps are [B, H, W, C]."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORMS = ('batch', 'group', 'group_blocks')
ACTIVATIONS = {'leaky_relu': nn.leaky_relu, 'swish': nn.swish}
GAINS = {'leaky_relu': 2.0, 'swish': 2.8}
"""1 / E[f(x)^2] of each activation f for x of variance 1."""
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def num_groups(channels: int) -> int:
  """Groups of GroupNorm: 32, or a quarter of fewer than 128 channels.

  Raises:
    ValueError: they do not divide the channels.
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
    axis_name: mapped axis of the batch statistics; None under `jit` with
      shardings, where they are global.
    kind: 'batch', or a group norm (`num_groups`, eps 1e-6), without statistics.
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
    options = {'dtype': self.dtype, 'scale_init': scale}
    if self.kind != 'batch':
      groups = num_groups(x.shape[-1])
      return nn.GroupNorm(groups, epsilon=1e-6, name='gn', **options)(x)
    options['axis_name'] = None if self.is_initializing() else self.axis_name
    norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, name='bn', **options)
    return norm(x, use_running_average=not train)


class ResidualBlock(nn.Module):
  """act(x + norm(conv(act(norm(conv(x)))))), 3x3 convolutions.

  The second norm starts at scale 0, so that a block starts as the identity
  (Goyal et al. 2017, arXiv:1706.02677): twelve blocks that start at scale 1
  need several times as many steps to the same error; see docs/results.md. For
  the fields see `Norm` and `ACTIVATIONS`.
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
      norm = Norm(self.dtype, self.axis_name, self.norm, i > 0, name=f'norm{i}')
      y = norm(y, train=train)
      y = act(y if i == 0 else x + y)
    return y


class SelfAttention(nn.Module):
  """x + attention(layer_norm(x)) over all H W positions (paper 3.3).

  Attributes:
    num_heads: heads; must divide the channels.
    dtype: compute dtype; the softmax is float32.
    normed: True: x is already normalised: attention(x), without norm and sum.
  """

  num_heads: int
  dtype: Any = jnp.float32
  normed: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, whole: jax.Array | None = None) -> jax.Array:
    """Maps x [B, H, W, C] to the same shape.

    whole: positions [B, h, w, C] for keys and values; None: x.
    """
    channels = x.shape[-1]
    if channels % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of the {channels} channels, the last '
        f'width, got {self.num_heads}'
      )
    norm = lambda x: x  # noqa: E731
    if not self.normed:
      norm = nn.LayerNorm(dtype=self.dtype, name='norm')
    y = jax.lax.collapse(norm(x), 1, 3)
    z = y if whole is None else jax.lax.collapse(norm(whole), 1, 3)
    heads = (self.num_heads, channels // self.num_heads)
    query, key, value = (
      nn.DenseGeneral(heads, dtype=self.dtype, name=name)(inputs)
      for name, inputs in (('query', y), ('key', z), ('value', z))
    )
    if whole is None:
      y = attend(query, key, value)
    else:  # by rows: the scores of all rows would fit into no cache
      rows = query.reshape(len(x), x.shape[1], -1, *heads).swapaxes(0, 1)
      y = jax.lax.map(lambda row: attend(row, key, value), rows)
      y = y.swapaxes(0, 1).reshape(query.shape)
    y = nn.DenseGeneral(channels, (-2, -1), dtype=self.dtype, name='out')(y)
    y = y.reshape(x.shape)
    return y if self.normed else x + y


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(query key^T / sqrt(d)) value, with the scores in float32.

  In half precision, a GPU of compute capability 8.0 or more runs cuDNN's fused
  kernel. Otherwise, if the B H T T scores do not fit into a tile (4 MiB on CPU,
  256 MiB on other devices), a loop attends a few heads at a time and recomputes
  their scores in the backward pass.

  query is [B, T, H, d], H heads of d channels; key and value [B, S, H, d].
  """
  on_cpu = functools.partial(_attend_in_tiles, scores=2**20)
  return jax.lax.platform_dependent(
    query, key, value, cpu=on_cpu, default=_attend_on_accelerator
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
  sharded axis, so each device works on its own images.
  """
  batch, tokens, heads, dim = query.shape
  count = batch * heads
  most = max(1, scores // (tokens * key.shape[1]))
  tile = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def split(x):
    x = x.transpose(0, 2, 1, 3).reshape(tile, -1, x.shape[1], dim)
    return jnp.moveaxis(x, 1, 0)

  def attend_tile(qkv):
    q, k, v = qkv
    logits = product('nqd,nkd->nqk', q, k) * dim**-0.5
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1))[..., None])
    # Dividing by the sum after the product takes d numbers per query, not T,
    # also in the derivative.
    y = product('nqk,nkd->nqd', weights.astype(v.dtype), v)
    return (y / weights.sum(-1)[..., None]).astype(v.dtype)

  qkv = tuple(split(x) for x in (query, key, value))
  if tile == count:
    y = attend_tile([x[0] for x in qkv])[None]
  else:
    y = jax.lax.map(jax.checkpoint(attend_tile), qkv)
  y = jnp.moveaxis(y, 0, 1).reshape(batch, heads, tokens, dim)
  return y.transpose(0, 2, 1, 3)


class Upsample(nn.Module):
  """`nn.ConvTranspose(features, (4, 4), (2, 2))` by `upsample`.

  With side = 3: a 3x3 convolution of nearest neighbours, in 4 products, not 9.
  """

  features: int
  dtype: Any = jnp.float32
  side: int = 4
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, H, W, C] to [B, 2H, 2W, features]."""
    shape = (self.side, self.side, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    kernel = kernel.astype(self.dtype)
    if self.side == 3:  # each product acts on two equal neighbours
      kernel = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
      kernel = kernel[1:] + kernel[:-1]
      kernel = kernel[:, 1:] + kernel[:, :-1]
    y = upsample(x.astype(self.dtype), kernel)
    return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def upsample(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Transposed convolution [B, H, W, C] -> [B, 2H, 2W, F], kernel [4, 4, C, F].

  It is the transpose of a strided convolution, whose kernels in cuDNN and
  XLA:CPU compute its derivatives. `lax.conv_transpose` would first insert zeros
  between the values of x: four times the memory and the operations.
  """
  # Under `shard_map` the kernel must vary over the devices like x, else JAX
  # does not sum a custom derivative over them.
  zero = (x[:1, :1, :1, :1] > 0).any() & False
  return _transposed(x, kernel + zero.astype(kernel.dtype))


@jax.custom_vjp
def _transposed(x, kernel):
  options = {'dimension_numbers': _DIMENSIONS, 'transpose_kernel': True}
  return jax.lax.conv_transpose(x, _turned(kernel), (2, 2), 'SAME', **options)


def _turned(kernel):
  # Transposing a convolution turns its kernel again. Without the barrier XLA
  # cancels both turns and does not recognise a transposed convolution.
  return jax.lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))


def _downsample(y, kernel):
  """Strided convolution [B, 2H, 2W, F] -> [B, H, W, C], kernel [4, 4, F, C]."""
  return jax.lax.conv_general_dilated(
    y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=_DIMENSIONS
  )


def _backward(saved, g):
  x, kernel = saved
  turned = _turned(kernel)
  (d_turned,) = jax.vjp(lambda k: _downsample(g, k), turned)[1](x)
  return _downsample(g, turned), d_turned.swapaxes(2, 3)[::-1, ::-1]


_transposed.defvjp(
  lambda x, kernel: (_transposed(x, kernel), (x, kernel)), _backward
)
