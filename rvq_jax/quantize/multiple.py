"""Several codes a position: residual depth, and heads (product quantization).

Both are made of `VectorQuantizer`s and take its arguments.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize import losses
from rvq_jax.quantize.base import (
  QuantizerOutput,
  arguments,
  check_input,
  project_out,
  validate,
)
from rvq_jax.quantize.codebook import valid_rows
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.movement import unit
from rvq_jax.quantize.vector_quantizer import VectorQuantizer


def _quantizer(module, name, **changed):
  """A `VectorQuantizer` with the arguments of `module`, but for `changed`."""
  own = {
    n: value
    for n, value in arguments(module).items()
    if n in VectorQuantizer.__dataclass_fields__
  }
  return VectorQuantizer(**own | changed, name=name)


def _mean(dicts):
  """Name -> mean, of dicts with the same names."""
  return {n: sum(d[n] for d in dicts) / len(dicts) for n in dicts[0]}


class ResidualQuantizer(VectorQuantizer):
  """Quantizes what the codes so far leave over, `depth` times (RQ-VAE).

  With r_0 = e: q_d is the code nearest to r_d, and r_(d+1) = r_d - q_d. The
  quantized vector is q_0 + q_1 + ...; a prefix of the codes is a coarser one.
  The estimator is applied once, from e to the whole sum: the sum of one
  estimate a level, which other implementations take, multiplies the gradient
  by the depth. The loss is the mean over the levels of MSE(e, sg(q_0 + ... +
  q_d)) and, for learned codes, of the codebook losses (Lee et al., CVPR 2022,
  eq. 7).

  ids are [..., depth], coarsest first; counts [depth, K], or [K] when the
  levels share one codebook. `metrics` holds the means over the levels, except
  for quantization_error, mean_angle, fallback_share, encoder_norm and
  code_norm, which are those of the whole sum, and `quantization_error_D`, the
  error that the first D codes leave.

  >>> import jax
  >>> from rvq_jax import ResidualQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (64, 8))
  >>> layer = ResidualQuantizer(codebook_size=16, depth=3)
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out = layer.apply(variables, z)
  >>> out.quantized.shape, out.ids.shape, out.counts.shape
  ((64, 8), (64, 3), (3, 16))
  >>> coarse = out.ids[:, :1]  # a prefix of the codes is a coarser vector
  >>> layer.apply(variables, coarse, method='codes_from_ids').shape
  (64, 8)

  Attributes:
    depth: codes a position.
    shared: one codebook for all levels, which then moves once a level.
    codebook_size: K, codes in each codebook. All other attributes are those of
      `VectorQuantizer`; cosine is not possible here.
  """

  depth: int = 4
  shared: bool = False

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    validate(**arguments(self))
    if self.cosine:
      raise ValueError(
        'ResidualQuantizer: expected cosine=False: a residual has a length '
        'that its unit vector forgets'
      )
    check_input(z, mask)
    channels = z.shape[-1]
    dim = self.code_dim or channels
    e = z.astype(jnp.float32)
    if dim != channels:
      e = nn.Dense(dim, name='project_in')(e)

    levels = [
      _quantizer(self, f'level_{d}', code_dim=dim)
      for d in range(1 if self.shared else self.depth)
    ]
    total, outputs, errors = None, [], {}
    for d in range(self.depth):
      left = e if total is None else e - jax.lax.stop_gradient(total)
      out = levels[0 if self.shared else d](left, train=train, mask=mask)
      outputs.append(out)
      q = jax.lax.stop_gradient(out.quantized)
      total = q if total is None else total + q
      error = out.metrics['quantization_error']
      errors[f'quantization_error_{d + 1}'] = error
    quantized = ESTIMATORS[self.estimator](e, total, self.max_scale)

    counts = [out.counts for out in outputs]
    counts = sum(counts) if self.shared else jnp.stack(counts)
    flat, sums = e.reshape(-1, dim), total.reshape(-1, dim)
    rows = jnp.ones(flat.shape[0], bool) if mask is None else mask.reshape(-1)
    metrics = _mean([out.metrics for out in outputs])
    metrics |= losses.directions(flat, sums, valid_rows(flat, rows))
    metrics['quantization_error'] = error
    if dim != channels:
      quantized = nn.Dense(channels, name='project_out')(quantized)
    return QuantizerOutput(
      quantized.astype(z.dtype),
      jnp.stack([out.ids for out in outputs], axis=-1),
      sum(out.loss for out in outputs) / self.depth,
      counts,
      metrics | errors,
    )

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids, or a prefix of their codes, stand for.

    Args:
      ids: code indices [..., d], int, each in [0, K), with d from 1 to depth.

    Returns:
      [..., C], float32: `quantized` of the forward pass when d is the depth.

    Raises:
      ValueError: d is out of range.
    """
    depth = ids.shape[-1] if ids.ndim else 0
    if not 1 <= depth <= self.depth:
      raise ValueError(
        f'expected ids [..., d] with d from 1 to {self.depth} codes a position,'
        f' got {ids.shape}'
      )
    total = None
    for d in range(depth):
      book = _embedding(self, f'level_{0 if self.shared else d}')
      codes = jnp.take(book, ids[..., d], axis=0)
      total = codes if total is None else total + codes
    return project_out(self, total)


class ProductQuantizer(VectorQuantizer):
  """Cuts each vector into `heads` pieces with a code each (Jegou et al. 2011).

  ids are [..., heads]; counts [heads, K], or [K] when the heads share one
  codebook. Loss and metrics are means over the heads. K codes a head are
  K^heads codes a position, at the cost of searching heads x K.

  >>> import jax
  >>> from rvq_jax import ProductQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (64, 8))
  >>> layer = ProductQuantizer(codebook_size=16, heads=2)
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out = layer.apply(variables, z)
  >>> out.quantized.shape, out.ids.shape, out.counts.shape
  ((64, 8), (64, 2), (2, 16))
  >>> variables['codebook']['head_0']['embedding'].shape  # of half a vector
  (16, 4)

  Attributes:
    heads: pieces, and codes a position.
    shared: one codebook for all heads.
    codebook_size: K, codes in each codebook.
    code_dim: D, numbers in a piece. Where heads x D differs from the input's
      channels C a linear projection leads in and another out. None: C / heads.
      All other attributes are those of `VectorQuantizer`.
  """

  heads: int = 2
  shared: bool = False

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    validate(**arguments(self))
    check_input(z, mask)
    channels, heads = z.shape[-1], self.heads
    if self.code_dim is None and channels % heads:
      raise ValueError(
        f'ProductQuantizer: expected channels that {heads} heads divide, got '
        f'{channels}; or give code_dim'
      )
    dim = self.code_dim or channels // heads
    e = z.astype(jnp.float32)
    if heads * dim != channels:
      e = nn.Dense(heads * dim, name='project_in')(e)
    e = e.reshape(z.shape[:-1] + (heads, dim))

    if self.shared:
      rows = mask
      if mask is not None:
        rows = jnp.broadcast_to(mask[..., None], e.shape[:-1])
      out = _quantizer(self, 'head_0', code_dim=dim)(e, train=train, mask=rows)
      quantized, ids, loss = out.quantized, out.ids, out.loss
      counts, metrics = out.counts, out.metrics
    else:
      outputs = [
        _quantizer(self, f'head_{h}', code_dim=dim)(
          e[..., h, :], train=train, mask=mask
        )
        for h in range(heads)
      ]
      quantized = jnp.stack([out.quantized for out in outputs], axis=-2)
      ids = jnp.stack([out.ids for out in outputs], axis=-1)
      loss = sum(out.loss for out in outputs) / heads
      counts = jnp.stack([out.counts for out in outputs])
      metrics = _mean([out.metrics for out in outputs])
    quantized = quantized.reshape(z.shape[:-1] + (heads * dim,))
    if heads * dim != channels:
      quantized = nn.Dense(channels, name='project_out')(quantized)
    return QuantizerOutput(
      quantized.astype(z.dtype), ids, loss, counts, metrics
    )

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids stand for: `quantized` of the forward.

    Args:
      ids: code indices [..., heads], int, each in [0, K).

    Returns:
      [..., C], float32.

    Raises:
      ValueError: the last axis of ids is not the heads.
    """
    if ids.ndim < 1 or ids.shape[-1] != self.heads:
      raise ValueError(
        f'expected ids [..., {self.heads}], a code a head, got {ids.shape}'
      )
    pieces = [
      jnp.take(
        _embedding(self, f'head_{0 if self.shared else h}'),
        ids[..., h],
        axis=0,
      )
      for h in range(self.heads)
    ]
    return project_out(self, jnp.concatenate(pieces, axis=-1))


def _embedding(module, name):
  """The codes [K, D] of the `VectorQuantizer` called `name` in a module."""
  source = 'codebook' if module.ema else 'params'
  codes = module.get_variable(source, name)['embedding']
  return unit(codes) if module.cosine and not module.ema else codes
