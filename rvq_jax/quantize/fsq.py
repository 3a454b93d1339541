"""`FSQ`, a baseline: rounding, and no codebook to learn."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import (
  Dense,
  Quantizer,
  QuantizerOutput,
  direction_metrics,
  masked_mean,
)
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.gradients import straight_through

FSQ_EPS = 1e-3


def fsq_levels(codebook_size: int) -> tuple[int, ...]:
  """Levels for `FSQ` whose product is exactly a given power of two.

  Eights first, then fours: 2^14 -> (8, 8, 8, 8, 4), 2^10 -> (8, 8, 4, 4). The
  paper's products are only near, such as (8, 5, 5, 5) = 1000 for 2^10.

  Raises:
    ValueError: K is not a power of two, or is under 2.
  """
  bits = max(codebook_size.bit_length() - 1, 1)
  if codebook_size != 2**bits:
    near = min(2**bits, 2 ** (bits + 1), key=lambda k: abs(k - codebook_size))
    raise ValueError(
      'codebook_size: expected a power of two, at least 2, got '
      f'{codebook_size!r}; use the nearest, {near}, or set `levels` that '
      'multiply to it'
    )
  if bits == 1:
    return (2,)
  fours = -bits % 3
  return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


def _bound(x, levels):
  """x [N, d] squashed so that rounding gives L values, as in the paper."""
  half = [(n - 1) * (1 - FSQ_EPS) / 2 for n in levels]
  offset = [0.0 if n % 2 else 0.5 for n in levels]
  shift = [math.tan(o / h) for o, h in zip(offset, half, strict=True)]
  half, offset, shift = (
    jnp.asarray(v, jnp.float32)[None] for v in (half, offset, shift)
  )
  return jnp.tanh(x + shift) * half - offset


class FSQ(Quantizer):
  """Rounds each of a few dimensions: finite scalar quantization.

  Mentzer et al., ICLR 2024 (arXiv:2309.15505). A linear layer leads to d
  dimensions; tanh bounds dimension i, shifted by half a step if its levels L_i
  are even; it is rounded to one of L_i integers and divided by floor(L_i / 2);
  a second linear layer leads back. The gradient passes the rounding straight
  through. The d integers are the mixed-radix digits of an id, the first one the
  least significant. FSQ has no codebook and no loss; `train` changes nothing.

  `metrics` holds usage and perplexity of the batch, and quantization_error
  (mean squared, per dimension), mean_angle (degrees), fallback_share,
  encoder_norm and code_norm, all between the d bounded values before and after
  rounding, divided by floor(L_i / 2).

  Attributes:
    levels: L_1 ... L_d, each at least 2, with product K. None: `fsq_levels`.
  """

  levels: tuple[int, ...] | None = field(None)

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z [..., C]; see `VectorQuantizer.__call__`."""
    del train
    e, mask = self.inputs(z, mask)
    levels = self._levels()
    bounded = _bound(Dense(len(levels), name='project_in')(e), levels)
    ids, digits = _round(bounded, levels)
    bounded = bounded / _halves(levels).astype(jnp.float32)
    q = _values(digits, levels)
    counts = self.count(ids, e, mask)
    metrics = diversity(counts) | direction_metrics(bounded, q, mask)
    metrics['quantization_error'] = masked_mean((bounded - q) ** 2, mask)
    quantized, loss = straight_through(bounded, q), jnp.zeros((), jnp.float32)
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics, project=True)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [...] int32 of z [..., C], equal to the call's."""
    levels = self._levels()
    bounded = _bound(self.bound('project_in', self.rows(z)), levels)
    return _round(bounded, levels)[0].reshape(z.shape[:-1])

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 of ids [...] in [0, K)."""
    digits, rest = [], ids.reshape(-1)
    for n in self._levels():
      digits.append(rest % n)
      rest = rest // n
    values = _values(jnp.stack(digits, -1), self._levels())
    return self.bound('project_out', values.reshape(*ids.shape, len(digits)))

  def _levels(self):
    """The levels, checked."""
    if self.levels is None:
      return fsq_levels(self.codebook_size)
    levels = tuple(self.levels)
    if min(levels) < 2 or math.prod(levels) != self.codebook_size:
      raise ValueError(
        'levels: expected integers of at least 2 that multiply to '
        f'codebook_size {self.codebook_size}, got {levels}'
      )
    return levels


def _halves(levels):
  """floor(L_i / 2) as int32 [1, d]."""
  return jnp.asarray([n // 2 for n in levels], jnp.int32)[None]


def _round(bounded, levels):
  """Ids [N] of bounded values [N, d], and their digits, each in [0, L)."""
  # Rounding stays inside the levels; only rows with NaN need the clip.
  digits = jnp.nan_to_num(jnp.round(bounded)).astype(jnp.int32)
  top = jnp.asarray(levels, jnp.int32)[None] - 1
  digits = jnp.clip(digits + _halves(levels), 0, top)
  weights = [math.prod(levels[:i]) for i in range(len(levels))]
  return jnp.sum(digits * jnp.asarray(weights, jnp.int32)[None], -1), digits


def _values(digits, levels):
  """The values of digits [N, d]."""
  half = _halves(levels)
  return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)
