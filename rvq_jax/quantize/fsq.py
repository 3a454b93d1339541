"""`FSQ`, a baseline: rounding, and no codebook to learn."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import Quantizer, QuantizerOutput
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.gradients import straight_through
from rvq_jax.quantize.losses import direction_metrics, masked_mean

FSQ_EPS = 1e-3


def fsq_levels(codebook_size: int) -> tuple[int, ...]:
  """Levels for `FSQ` whose product is a given power of two, exactly.

  Eights first, then fours, so that every method spends the same bits: 2^14 ->
  (8, 8, 8, 8, 4), 2^10 -> (8, 8, 4, 4); 2 -> (2,).

  Args:
    codebook_size: K, at least 2.

  Raises:
    ValueError: K is no power of two.
  """
  bits = max(codebook_size.bit_length() - 1, 1)
  if codebook_size != 2**bits:
    near = min(2**bits, 2 ** (bits + 1), key=lambda k: abs(k - codebook_size))
    raise ValueError(
      'codebook_size: expected a power of two from 2 up, got '
      f'{codebook_size!r}; the nearest is {near}, or give `levels` that '
      'multiply to it'
    )
  if bits == 1:
    return (2,)
  fours = -bits % 3
  return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


def _bound(x, levels):
  """x [N, d] squashed so that rounding gives L values, as the paper's code."""
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
  dimensions; dimension i is bounded by tanh, with half a step's shift where its
  levels L_i are even, rounded to one of L_i integers and divided by
  floor(L_i / 2); a second linear layer leads back. The gradient passes the
  rounding straight through. An id is the integer whose mixed-radix digits are
  the d levels, the first one the least. There is no codebook and no loss;
  `train` changes nothing.

  The paper's levels have a product near a power of two, e.g. (8, 5, 5, 5) =
  1000 for 2^10. The default here meets it exactly, at the price of fours.

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
    bounded = _bound(nn.Dense(len(levels), name='project_in')(e), levels)
    digits = _digits(bounded, levels)
    ids = _ids(digits, levels)
    bounded = bounded / _halves(levels, 2).astype(jnp.float32)
    q = _values(digits, levels)
    counts = self.count(ids, e, mask)
    metrics = diversity(counts) | direction_metrics(bounded, q, mask)
    metrics['quantization_error'] = masked_mean((bounded - q) ** 2, mask)
    quantized, loss = straight_through(bounded, q), jnp.zeros((), jnp.float32)
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics, project=True)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [...] int32 of z [..., C], as the call gives them."""
    levels = self._levels()
    bounded = _bound(self.bound('project_in', self.rows(z)), levels)
    return _ids(_digits(bounded, levels), levels).reshape(z.shape[:-1])

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 that ids [...] in [0, K) stand for."""
    digits = []
    for n in self._levels():
      digits.append(ids % n)
      ids = ids // n
    values = _values(jnp.stack(digits, -1), self._levels())
    return self.bound('project_out', values)

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


def _halves(levels, ndim):
  """floor(L_i / 2) as int32 [1, ..., d] of ndim axes."""
  half = jnp.asarray([n // 2 for n in levels], jnp.int32)
  return half.reshape((1,) * (ndim - 1) + (-1,))


def _digits(bounded, levels):
  """Bounded values [N, d] rounded to digits, each in [0, L)."""
  # Rounding stays inside the levels; the clip is for a row that holds NaN.
  digits = jnp.nan_to_num(jnp.round(bounded)).astype(jnp.int32)
  top = jnp.asarray(levels, jnp.int32)[None] - 1
  return jnp.clip(digits + _halves(levels, 2), 0, top)


def _ids(digits, levels):
  """The ids [N] of digits [N, d], the first digit the least."""
  weights = [math.prod(levels[:i]) for i in range(len(levels))]
  return jnp.sum(digits * jnp.asarray(weights, jnp.int32)[None], axis=-1)


def _values(digits, levels):
  """Digits [..., d], each in [0, L), as the values they stand for."""
  half = _halves(levels, digits.ndim)
  return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)
