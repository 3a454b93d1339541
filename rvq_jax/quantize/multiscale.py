"""`MultiscaleQuantizer`: the codes of an image on grids of growing side."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize import base, losses, scales
from rvq_jax.quantize.residual import check_residual
from rvq_jax.quantize.search import nearest_codes
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

PHIS = 4
"""Convolutions phi at most; scales next to each other share one."""


class MultiscaleQuantizer(VectorQuantizer):
  """Quantizes a grid from coarse to fine (VAR; Tian et al. 2024, section 3.2).

  With z the grid [n, n, D], s_1 < ... < s_L = n the sides and z^_0 = 0,

      ids_l = codes nearest to area_(s_l)(z - z^_(l-1))
      z^_l  = z^_(l-1) + phi_l(bicubic_n(codes of ids_l))
      phi(x) = (x + conv3x3(x)) / 2

  All scales share one codebook. Moving average, filling and splitting are over
  the tokens of all of them, each weighted by the area of the grid that it
  covers: the scales count alike, 1x1 as much as n x n. By numbers, the one
  token of 1x1 would keep next to no codes. The quantized grid is z^_L; the
  estimator is applied once, from z to z^_L. The loss is the mean over l of
  commitment_weight MSE(z, sg z^_l) + codebook_weight MSE(sg z, z^_l). The
  second term trains phi and, with `ema=False`, the codes. phi starts as the
  identity. The codebook is filled with what remains at each scale where coarser
  ones are not quantized.

  ids are [..., T], T = s_1^2 + ... + s_L^2, scale by scale, each row by row;
  the ids of the first scales decode to a coarser grid. counts are [K], over all
  scales. `metrics` holds the means over the scales, but for those of the sum
  (quantization_error, mean_angle, fallback_share, encoder_norm, code_norm), and
  of each scale l `usage_l` (codes that it chose, as a share of the lesser of K
  and its tokens in the batch), `perplexity_l` and `quantization_error_l` (what
  the scales 1 to l leave).

  Positions out of the mask stay out of the means too that coarse tokens are of.

  >>> import jax
  >>> from rvq_jax import MultiscaleQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
  >>> layer = MultiscaleQuantizer(codebook_size=16, sides=(1, 2, 4))
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out = layer.apply(variables, z)
  >>> out.quantized.shape, out.ids.shape, out.counts.shape
  ((2, 4, 4, 8), (2, 21), (16,))
  >>> coarse = out.ids[:, :5]  # of the scales 1x1 and 2x2
  >>> layer.apply(variables, coarse, method='codes_from_ids').shape
  (2, 4, 4, 8)

  Attributes:
    sides: s_1 < ... < s_L = n; None: `default_sides(n)`, but `codes_from_ids`
      needs them. All other attributes are those of `VectorQuantizer`; cosine,
      dynamic_ste and diveq are not possible here. With `freeze` phi does not
      learn either.
  """

  sides: tuple[int, ...] | None = None

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> base.QuantizerOutput:
    """Quantizes z [..., n, n, C]; see `VectorQuantizer.__call__`."""
    check_residual(self)
    e, mask = base.flatten(self, z, mask)
    sides = self._checked_sides(z)
    e = base.project_in(e, self.code_dim or z.shape[-1])
    batch, dim = (-1, *z.shape[-3:-1]), e.shape[1]
    grid, mask_grid = e.reshape(*batch, dim), mask.reshape(batch)
    grid = jax.lax.stop_gradient(grid)
    phis = [
      self.param(f'phi_{i}', scales.identity_phi, dim)
      for i in range(min(PHIS, len(sides)))
    ]
    areas = jnp.tile(scales.token_weights(sides), len(grid))
    book, write = self._codebook(batch=len(areas), dim=dim)
    update = train and not self.is_initializing()
    fill = update and self.init_from == 'data'
    if self.freeze:
      fill = fill and self.is_mutable_collection('codebook')
      update = False
    if fill:
      rows, valid = _flat(*scales.pyramid(grid, mask_grid, sides))
      share = jnp.where(valid, areas, 0.0)
      book = self._fill(book, rows, share, self._expected_count(rows, share))

    total, found, parts = jnp.zeros_like(grid), [], []
    for number, side in enumerate(sides):
      rows, valid = scales.pool(grid - total, mask_grid, side)
      ids = nearest_codes(rows.reshape(-1, dim), book.embedding)
      ids = ids.reshape(valid.shape)
      q = jnp.take(book.embedding, ids, axis=0)
      if self.ema or self.freeze:
        q = jax.lax.stop_gradient(q)
      total += _addend(phis, q, number, sides)
      found.append((rows, valid, ids))
      parts.append(self._loss(e, total.reshape(e.shape), mask))
    total = total.reshape(e.shape)
    quantized = base.estimate(self, e, total, None, mask)

    counts = [
      base.count(self, ids.reshape(-1), *_flat(rows, valid))
      for rows, valid, ids in found
    ]
    metrics = self._metrics([part for _, part in parts], counts)
    metrics |= losses.direction_metrics(e, total, mask)
    # Image by image, so that the rows of a device are next to each other.
    rows, valid, ids = (jnp.concatenate(x, 1) for x in zip(*found, strict=True))
    (rows, valid), ids = _flat(rows, valid), ids.reshape(-1)
    share = jnp.where(valid, areas, 0.0)
    expected, counts = self._expected_count(rows, share), sum(counts)
    dead = self._dead(book, expected)
    metrics['dead_codes'] = jnp.mean(dead.astype(jnp.float32))
    if update:
      book, replaced = self._update(book, rows, ids, share, expected)
      metrics['replaced_codes'] = replaced.astype(jnp.float32)
    if update or fill:
      write(book)
    loss = sum(loss for loss, _ in parts) / len(parts)
    out = base.finish(z, quantized, jnp.zeros(len(e)), loss, counts, metrics)
    return out.replace(ids=ids.reshape(*z.shape[:-3], -1))

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The grid that ids, or those of the first scales, stand for.

    Args:
      ids: code indices [..., T], int, each in [0, K), with T the tokens of the
        first scale, of the first two, ... or of all.

    Returns:
      [..., n, n, C], float32: `quantized` of the forward pass where T is whole.

    Raises:
      ValueError: T is something else, or the layer was not given its sides.
    """
    if not self.sides:
      raise ValueError(
        'MultiscaleQuantizer: expected its argument sides, without which ids '
        'do not tell the grid that they are of'
      )
    offsets = scales.token_offsets(self.sides)
    if not ids.ndim or ids.shape[-1] not in offsets[1:]:
      raise ValueError(
        f'expected ids [..., T] with T one of {offsets[1:]}, the tokens of the '
        f'first scales, got {ids.shape}'
      )
    phis = [
      self.get_variable('params', f'phi_{i}')
      for i in range(min(PHIS, len(self.sides)))
    ]
    codes, total = base.embedding(self), 0.0
    for number in range(offsets.index(ids.shape[-1])):
      part = ids[..., offsets[number] : offsets[number + 1]]
      q = jnp.take(codes, part.reshape(-1, part.shape[-1]), axis=0)
      total += _addend(phis, q, number, self.sides)
    total = total.reshape(*ids.shape[:-1], *total.shape[1:])
    return base.project_out(self, total)

  def _checked_sides(self, z):
    """The sides, for a grid that they fit."""
    grid = z.shape[-3:-1]
    if z.ndim < 4 or grid[0] != grid[1]:
      raise ValueError(
        'MultiscaleQuantizer: expected a square grid [..., n, n, C], got '
        f'{list(z.shape)}'
      )
    sides = self.sides or scales.default_sides(grid[0])
    if any(a >= b for a, b in zip(sides, sides[1:], strict=False)) or (
      sides[-1] != grid[0]
    ):
      raise ValueError(
        'MultiscaleQuantizer: expected sides that grow up to that of the grid, '
        f'{grid[0]}, got {tuple(sides)}; multi-scale tokens are of images of '
        'one size: resize or crop them'
      )
    return tuple(sides)

  def _loss(self, e, q, mask):
    """As of all quantizers, but the codebook's loss trains phi too."""
    return losses.quantizer_loss(
      e,
      jax.lax.stop_gradient(q) if self.freeze else q,
      mask,
      form=self.loss_form,
      commitment_weight=self.commitment_weight,
      codebook_weight=0.0 if self.freeze else self.codebook_weight,
      axis_name=base.mapped_axis(self),
    )

  def _metrics(self, parts, counts):
    """Means over the scales, and what is known of each."""
    metrics = {n: sum(p[n] for p in parts) / len(parts) for n in parts[0]}
    metrics |= diversity(sum(counts))
    for number, (part, count) in enumerate(zip(parts, counts, strict=True), 1):
      own = diversity(count)
      most = jnp.clip(jnp.sum(count), 1, self.codebook_size)
      metrics[f'usage_{number}'] = own['usage'] * self.codebook_size / most
      metrics[f'perplexity_{number}'] = own['perplexity']
      error = part['quantization_error']
      metrics[f'quantization_error_{number}'] = error
    return metrics | {'quantization_error': error}


def _addend(phis, q, number, sides):
  """What codes q [B, side^2, D] add to the whole grid, as scale `number`."""
  x = scales.expand(q, sides[-1])
  return scales.phi(phis[number * len(phis) // len(sides)], x)


def _flat(rows, valid):
  """[B, T, D] and [B, T] as [B T, D] and [B T]."""
  return rows.reshape(-1, rows.shape[-1]), valid.reshape(-1)
