"""`Quantizer`, the base of all quantizers: output, loss and metrics."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.quantize import fields
from rvq_jax.quantize.codebook import count_codes, row_weights
from rvq_jax.quantize.fields import MAX_INT32, field
from rvq_jax.quantize.gradients import ESTIMATORS, geometry
from rvq_jax.quantize.search import search

# For layers that decide ids: GPUs would multiply in TF32.
HIGHEST = jax.lax.Precision.HIGHEST
Dense = functools.partial(nn.Dense, precision=HIGHEST)


@flax.struct.dataclass
class QuantizerOutput:
  """The output of a quantizer for inputs [..., C].

  Attributes:
    quantized: the codes in place of the inputs, [..., C] in the input's dtype.
    ids: index of each code, [...] int32; [..., L] with L codes per position.
    loss: weighted commitment and codebook loss, float32 scalar. With an
      axis_name the mean over devices is the loss of the global batch.
    counts: how often each code was chosen in the global batch, float32 [K];
      [L, K] with L codes per position, each from its own codebook.
    metrics: name -> float32 scalar over this device's batch; see
      `VectorQuantizer`.
  """

  quantized: jax.Array
  ids: jax.Array
  loss: jax.Array
  counts: jax.Array
  metrics: dict[str, jax.Array]


def check_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless the mask is bool of this shape, or None."""
  if mask is not None and (mask.dtype, mask.shape) != (jnp.bool_, shape):
    raise ValueError(
      f'expected a mask of bool {shape}, got {mask.dtype} {mask.shape}'
    )


class Quantizer(nn.Module):
  """Replaces inputs [..., C] by codes, each with an id.

  A subclass defines `__call__(z, *, train=False, mask=None)`, which returns a
  `QuantizerOutput`; `ids(z)`, which returns only its ids; and `codes()` or
  `codes_from_ids(ids)`.

  Attributes:
    codebook_size: K, number of codes.
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
  """

  codebook_size: int = field(low=1, high=MAX_INT32)
  axis_name: Any = dataclasses.field(default=None, kw_only=True)

  def check(self) -> None:
    """Raises ValueError for an argument that this quantizer cannot take."""
    fields.check(self)

  def rows(self, z: jax.Array) -> jax.Array:
    """z [..., C] as [N, C] float32; ValueError if it is not a float array."""
    if z.ndim < 1 or not jnp.issubdtype(z.dtype, jnp.floating):
      raise ValueError(f'expected float [..., C], got {z.dtype} {z.shape}')
    return z.astype(jnp.float32).reshape(-1, z.shape[-1])

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 of ids [...] in [0, K)."""
    return self.bound('project_out', jnp.take(self.codes(), ids, axis=0))

  def inputs(
    self, z: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """z as `rows` and the mask [...] as bool [N], for checked arguments.

    Raises:
      ValueError: an argument is out of range, z is not a float array, or the
        mask has another shape or dtype.
    """
    self.check()
    e = self.rows(z)
    check_mask(mask, z.shape[:-1])
    return e, jnp.ones(len(e), bool) if mask is None else mask.reshape(-1)

  def project_in(self, e: jax.Array, dim: int) -> jax.Array:
    """e [N, C] as [N, dim], in a call: by a linear layer if dim is not C."""
    return e if dim == e.shape[-1] else Dense(dim, name='project_in')(e)

  def bound(self, name: str, x: jax.Array) -> jax.Array:
    """x [..., A] through the linear layer `name` of bound variables, if any."""
    if not self.has_variable('params', name):
      return x
    params: dict[str, jax.Array] = self.get_variable('params', name)
    dense = Dense(params['kernel'].shape[1], parent=None)
    projected: Any = dense.apply({'params': params}, x)
    return projected

  @property
  def mapped_axis(self):
    """axis_name; None in `init`, which runs outside any mapped axis."""
    return None if self.is_initializing() else self.axis_name

  def normed(self, x: jax.Array) -> jax.Array:
    """Vectors or codes [..., D] in the form for the search."""
    return x

  def count(self, ids: jax.Array, e: jax.Array, mask: jax.Array) -> jax.Array:
    """Counts [K] of ids [N] over the valid rows e [N, D] of the global batch.

    The mask may hold weights [N].
    """
    weight, axis = row_weights(e, mask), self.mapped_axis
    return count_codes(ids, self.codebook_size, weight=weight, axis_name=axis)

  def share(self, loss: jax.Array, mask: jax.Array) -> jax.Array:
    """Scales a device's mean loss so that the mean over devices is global.

    Devices may have unequal numbers of valid rows; mask [N] marks this one's.
    """
    if self.mapped_axis is None:
      return loss
    count = jnp.sum(mask.astype(jnp.float32))
    mean = jax.lax.pmean(count, self.mapped_axis)
    return loss * (count / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

  def finish(
    self,
    z: jax.Array,
    quantized: jax.Array,
    ids: jax.Array,
    loss: jax.Array,
    counts: jax.Array,
    metrics: dict[str, jax.Array],
    *,
    project: bool = False,
  ) -> QuantizerOutput:
    """The output of a call for z [..., C]; no gradient through the metrics.

    quantized is [N, D]. If D and C differ, or with `project`, a linear layer
    'project_out' leads from D to C.
    """
    quantized = quantized.reshape(z.shape[:-1] + quantized.shape[1:])
    if project or quantized.shape[-1] != z.shape[-1]:
      quantized = Dense(z.shape[-1], name='project_out')(quantized)
    quantized = quantized.astype(z.dtype)
    metrics = jax.lax.stop_gradient(metrics)
    return QuantizerOutput(quantized, ids, loss, counts, metrics)


LOSS_FORMS = ('two_weights', 'paper_eq5', 'paper_eq8')


class NearestQuantizer(Quantizer):
  """A quantizer that gives each vector its nearest code.

  Attributes: as in `VectorQuantizer`.
  """

  code_dim: int | None = field(None, 1, 2**20)
  estimator: str = field('rotation', choices=ESTIMATORS)
  commitment_weight: float = field(0.25, 0)
  codebook_weight: float = field(1.0, 0)
  max_scale: float = field(10.0, 1e-30)

  loss_form = LOSS_FORMS[0]
  inner_product = False
  several_codes = False  # per vector

  def check(self) -> None:
    """As in `Quantizer`; nothing but 'diveq' may train codes beside it."""
    super().check()
    if self.inner_product and self.several_codes:
      raise ValueError(
        f'{type(self).__name__}: a vector has several codes: expected '
        'inner_product=False'
      )
    if self.inner_product and self.cosine:
      raise ValueError(
        'inner_product: expected False with cosine=True, which already takes '
        'the largest inner product of unit vectors'
      )
    if self.estimator == 'diveq' and self.trains_codes():
      raise ValueError(
        "estimator: 'diveq' trains learned codes by itself: expected "
        "ema=False, loss_form='two_weights' and both its weights 0"
      )

  def trains_codes(self) -> bool:
    """Whether anything but the estimator trains codes or encoder."""
    return bool(self.commitment_weight or self.codebook_weight)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [...] int32 of z [..., C], equal to the call's."""
    e = self.normed(self.bound('project_in', self.rows(z)))
    ids, _ = search(e, self.codes(), inner=self.inner_product)
    return ids.reshape(z.shape[:-1])

  def nearest(
    self, e: jax.Array, codes: jax.Array, mask: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Ids [N] of e [N, D] in codes [K, D]; without `train` ambiguous_share."""
    if train and self.inner_product and not self.freeze:
      raise ValueError(
        "inner_product: expected freeze='codes' or 'encoder,codes' in training "
        '(in the layer freeze=True): rvq_jax has no softmax over all codes to '
        'train them'
      )
    ids, ambiguous = search(e, codes, inner=self.inner_product)
    share = masked_mean(ambiguous.astype(jnp.float32), mask)
    return ids, {} if train else {'ambiguous_share': share}

  def estimate(
    self, e: jax.Array, q: jax.Array, ids: jax.Array | None, mask: jax.Array
  ) -> jax.Array:
    """q [N, D]; the estimator maps its gradient to e [N, D]."""
    return ESTIMATORS[self.estimator](
      e,
      q,
      ids=ids,
      num_codes=self.codebook_size,
      mask=mask,
      max_scale=self.max_scale,
      axis_name=self.mapped_axis,
    )

  def loss(
    self, e: jax.Array, q: jax.Array, mask: jax.Array, codebook_weight: float
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Commitment and codebook loss of e and q [N, D] (paper eq. 5 and 8).

    Returns:
      The loss, scaled by `share`; and for this device's rows
      quantization_error, commitment_loss (the part of the loss that trains the
      encoder) and codebook_loss (not weighted), all float32 scalars.
    """
    weight = mask.astype(jnp.float32)[:, None]
    size = jnp.maximum(jnp.sum(weight), 1.0) * e.shape[1]
    stop, beta = jax.lax.stop_gradient, self.commitment_weight

    def mse(a, b):
      return jnp.sum(jnp.where(weight > 0, (a - b) ** 2, 0.0)) / size

    to_encoder, to_codes = mse(e, stop(q)), mse(stop(e), q)
    if self.loss_form == 'two_weights':
      loss = commitment = beta * to_encoder
      if codebook_weight:
        loss += codebook_weight * to_codes
    elif self.loss_form == 'paper_eq5':
      commitment = to_encoder
      loss = mse(q, e) + beta * mse(q, stop(e))
    else:
      loss = commitment = 0.5 * beta * e.shape[1] * to_encoder
    return self.share(loss, mask), {
      'quantization_error': to_encoder,
      'commitment_loss': commitment,
      'codebook_loss': to_codes,
    }


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x [N, ...] over the valid rows, mask [N] bool; a scalar."""
  x = jnp.mean(x.reshape(len(x), -1), axis=1)
  total = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
  return jnp.sum(jnp.where(mask, x, 0.0)) / total


def direction_metrics(
  e: jax.Array, q: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Mean angle (degrees) and norms of vectors e and codes q [N, D].

  Skips rows that are not finite or are outside the mask [N].
  docs/codebook_health.md explains how to read them.
  """
  valid = row_weights(e, mask) > 0
  view = geometry(e, q)
  return {
    'mean_angle': jnp.rad2deg(masked_mean(view.angle, valid)),
    'fallback_share': masked_mean(view.no_rotation.astype(jnp.float32), valid),
    'encoder_norm': masked_mean(jnp.linalg.norm(e, axis=1), valid),
    'code_norm': masked_mean(jnp.linalg.norm(q, axis=1), valid),
  }
