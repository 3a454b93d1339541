"""`MultiscaleQuantizer`: the codes of an image on grids of growing side."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize import scales
from rvq_jax.quantize.base import (
  QuantizerOutput,
  direction_metrics,
  masked_mean,
)
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.search import search
from rvq_jax.quantize.vector_quantizer import VectorQuantizer


class MultiscaleQuantizer(VectorQuantizer):
  """Quantizes a grid from coarse to fine (VAR; Tian et al. 2024, section 3.2).

  With z the grid [n, n, D], s_1 < ... < s_L = n the sides and z^_0 = 0,

      ids_l = codes nearest to area_(s_l)(z - z^_(l-1))
      z^_l  = z^_(l-1) + phi_l(bicubic_n(codes of ids_l))
      phi(x) = (x + conv3x3(x)) / 2

  All scales share one codebook. Moving average, filling and splitting use the
  tokens of all scales, each weighted by the area of the grid that it covers:
  otherwise the 1x1 token would keep almost no codes. The quantized grid is
  z^_L; the estimator acts once, from z to z^_L. The loss is the mean over l of
  commitment_weight MSE(z, sg z^_l) + codebook_weight MSE(sg z, z^_l). The
  second term trains phi, at first the identity, and, with `ema=False`, the
  codes. The first batch fills the codebook with the unquantized residuals.

  ids are [..., T], T = s_1^2 + ... + s_L^2, scale by scale, each row by row;
  the ids of the first scales decode to a coarser grid. counts are [K], over all
  scales. `metrics` holds the means over the scales; for the sum
  quantization_error, mean_angle, fallback_share, encoder_norm and code_norm;
  and for each scale l `usage_l` (number of its codes over the smaller of K and
  its tokens in the batch), `perplexity_l` and `quantization_error_l` (the error
  after the scales 1 to l).

  Masked positions do not count in the area means of coarse tokens either, nor
  in the areas that weight the tokens.

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
      needs them. For the others see `VectorQuantizer`; cosine, inner_product,
      dynamic_ste and diveq are not possible here. `freeze` also freezes phi.
    resize: 'keys': fractional areas, and Keys' bicubic kernel. 'torch': as VAR,
      for weights trained with it: area and bicubic of PyTorch's `interpolate`,
      and VAR's choice of the phi of each scale.
  """

  sides: tuple[int, ...] | None = field(None)
  resize: str = field('keys', choices=scales.RESIZES)

  sums_codes = several_codes = True

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z [..., n, n, C]; see `VectorQuantizer.__call__`."""
    e, mask = self.inputs(z, mask)
    sides = self._checked_sides(z)
    e = self.project_in(e, self.code_dim or z.shape[-1])
    dim = e.shape[1]
    phis = [
      self.param(f'phi_{i}', scales.identity_phi, dim)
      for i in range(min(scales.PHIS, len(sides)))
    ]
    grid = jax.lax.stop_gradient(_grid(e, z))
    mask_grid = mask.reshape(grid.shape[:-1])
    areas = jnp.tile(scales.token_weights(sides), len(grid))

    def weighted(rows, share):
      """[B, T, D] and [B, T] as [B T, D] and the tokens' weights [B T]."""
      return rows.reshape(-1, dim), share.reshape(-1) * areas

    def first():
      return weighted(*scales.pyramid(grid, mask_grid, sides, self.resize))

    book = self._begin(train, first, (len(areas), dim))
    weight = 0.0 if self.freeze else self.codebook_weight
    tokens, parts, counts = [], [], []
    for rows, share, ids, close, total in _walk(
      grid, mask_grid, book.embedding, phis, sides, self.resize
    ):
      tokens.append((rows, share, ids, close))
      total = total.reshape(e.shape)
      q = jax.lax.stop_gradient(total) if self.freeze else total
      parts.append(self.loss(e, q, mask, weight))
      flat = ids.reshape(-1), rows.reshape(-1, dim), share.reshape(-1) > 0
      counts.append(self.count(*flat))
    quantized = self.estimate(e, total, None, mask)
    metrics = self._metrics([part for _, part in parts], counts)
    metrics |= direction_metrics(e, total, mask)
    # Image by image, so that the rows of a device are contiguous.
    rows, share, ids, close = (
      jnp.concatenate(x, 1) for x in zip(*tokens, strict=True)
    )
    if not train:
      close = close.astype(jnp.float32).reshape(-1)
      metrics['ambiguous_share'] = masked_mean(close, share.reshape(-1) > 0)
    rows, weights = weighted(rows, share)
    metrics |= self._end(train, book, rows, ids.reshape(-1), weights)
    loss: Any = sum(loss for loss, _ in parts) / len(parts)
    total_counts: Any = sum(counts)
    ids = ids.reshape(*z.shape[:-3], ids.shape[1])
    return self.finish(z, quantized, ids, loss, total_counts, metrics)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [..., T] int32 of z [..., n, n, C], equal to the call's."""
    sides = self._checked_sides(z)
    grid = _grid(self.bound('project_in', self.rows(z)), z)
    mask = jnp.ones(grid.shape[:-1], bool)
    phis = self._phis(sides)
    walk = _walk(grid, mask, self.codes(), phis, sides, self.resize)
    ids = jnp.concatenate([ids for _, _, ids, *_ in walk], axis=1)
    return ids.reshape(*z.shape[:-3], ids.shape[1])

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The grid [..., n, n, C] float32 of ids [..., T] in [0, K).

    T is the number of tokens of all scales, or of the first ones.

    Raises:
      ValueError: T is another number, or the layer has no `sides`.
    """
    if not self.sides:
      raise ValueError(
        'MultiscaleQuantizer: expected its argument sides; ids do not state '
        'the size of their grid'
      )
    offsets = scales.token_offsets(self.sides)
    if not ids.ndim or ids.shape[-1] not in offsets[1:]:
      raise ValueError(
        f'expected ids [..., T] with T one of {offsets[1:]}, the tokens of the '
        f'first scales, got {ids.shape}'
      )
    phis = self._phis(self.sides)
    codes = self.codes()
    total: Any = 0.0
    for number in range(offsets.index(ids.shape[-1])):
      part = ids[..., offsets[number] : offsets[number + 1]]
      q = jnp.take(codes, part.reshape(-1, part.shape[-1]), axis=0)
      total += _addend(phis, q, number, self.sides, self.resize)
    total = total.reshape(*ids.shape[:-1], *total.shape[1:])
    return self.bound('project_out', total)

  def _checked_sides(self, z):
    """The sides; ValueError unless they fit the grid."""
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
        'MultiscaleQuantizer: expected sides that grow up to the side of the '
        f'grid, {grid[0]}, got {tuple(sides)}; multi-scale tokens need images '
        'of one size: resize or crop them'
      )
    return tuple(sides)

  def _phis(self, sides):
    """The convolutions of bound variables."""
    numbers = range(min(scales.PHIS, len(sides)))
    return [self.get_variable('params', f'phi_{i}') for i in numbers]

  def _metrics(self, parts, counts):
    """Means over the scales, and the metrics of each scale."""
    metrics = {n: sum(p[n] for p in parts) / len(parts) for n in parts[0]}
    metrics |= diversity(sum(counts))
    for number, (part, count) in enumerate(zip(parts, counts, strict=True), 1):
      spread = diversity(count)
      most = jnp.clip(jnp.sum(count), 1, self.codebook_size)
      metrics[f'usage_{number}'] = spread['usage'] * self.codebook_size / most
      metrics[f'perplexity_{number}'] = spread['perplexity']
      error = part['quantization_error']
      metrics[f'quantization_error_{number}'] = error
    return metrics | {'quantization_error': error}


def _addend(phis, q, number, sides, resize):
  """The part of scale `number`, with codes q [B, side^2, D], in z^."""
  index = scales.phi_indices(len(sides), resize)[number]
  return scales.phi(phis[index], scales.expand(q, sides[-1], resize))


def _grid(e, z):
  """Rows e [N, D] of z [..., n, n, C] as [B, n, n, D]."""
  side, dim = z.shape[-2], e.shape[1]
  return e.reshape(len(e) // side**2, side, side, dim)


def _walk(grid, mask, codes, phis, sides, resize):
  """Yields per scale rows [B, s^2, D]; valid share, ids, ambiguity; z^."""
  total = jnp.zeros_like(grid)
  for number, side in enumerate(sides):
    rows, share = scales.pool(grid - total, mask, side, resize)
    found = search(rows.reshape(-1, rows.shape[-1]), codes)
    ids, close = (x.reshape(share.shape) for x in found)
    q = jnp.take(codes, ids, axis=0)
    total += _addend(phis, q, number, sides, resize)
    yield rows, share, ids, close, total
