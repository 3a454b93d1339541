"""The quantizer's loss, and metrics of codes and their vectors."""

import jax
import jax.numpy as jnp

from rvq_jax.quantize import gradients
from rvq_jax.quantize.codebook import valid_rows

LOSS_FORMS = ('two_weights', 'paper_eq5', 'paper_eq8')


def quantizer_loss(
  e: jax.Array,
  q: jax.Array,
  mask: jax.Array,
  *,
  form: str = 'two_weights',
  commitment_weight: float,
  codebook_weight: float,
  axis_name=None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Commitment and codebook loss (paper eq. 5 and 8).

  Args:
    e: encoder outputs [N, D], float32.
    q: their codes [N, D], float32.
    mask: valid rows [N], bool.
    form: 'two_weights': commitment_weight MSE(e, sg q) + codebook_weight
      MSE(sg e, q); 'paper_eq5': MSE(q, e) + commitment_weight MSE(q, sg e);
      'paper_eq8': commitment_weight/2 |e - sg q|^2, summed over D.
    commitment_weight: beta.
    codebook_weight: weight of the codebook loss, in 'two_weights'.
    axis_name: mapped axis or axes of the batch; see `share_of_loss`.

  Returns:
    The loss, and for this device's rows quantization_error, commitment_loss
    (the part of the loss that trains the encoder) and codebook_loss (not
    weighted), all float32 scalars.
  """
  weight = mask.astype(jnp.float32)[:, None]
  size = jnp.maximum(jnp.sum(weight), 1.0) * e.shape[1]
  stop = jax.lax.stop_gradient

  def mse(a, b):
    return jnp.sum(jnp.where(weight > 0, (a - b) ** 2, 0.0)) / size

  to_encoder, to_codes = mse(e, stop(q)), mse(stop(e), q)
  if form == 'two_weights':
    loss = commitment = commitment_weight * to_encoder
    if codebook_weight:
      loss += codebook_weight * to_codes
  elif form == 'paper_eq5':
    commitment = to_encoder
    loss = mse(q, e) + commitment_weight * mse(q, stop(e))
  else:
    loss = commitment = 0.5 * commitment_weight * e.shape[1] * to_encoder
  return share_of_loss(loss, mask, axis_name), {
    'quantization_error': to_encoder,
    'commitment_loss': commitment,
    'codebook_loss': to_codes,
  }


def share_of_loss(loss: jax.Array, mask: jax.Array, axis_name) -> jax.Array:
  """A device's loss, weighted so that the mean over devices is the global one.

  The loss is a mean over this device's valid rows; other devices may have more
  or fewer.

  Args:
    loss: scalar.
    mask: valid rows [N], bool.
    axis_name: mapped axis or axes of the batch; None: loss as it is.
  """
  if axis_name is None:
    return loss
  count = jnp.sum(mask.astype(jnp.float32))
  mean = jax.lax.pmean(count, axis_name)
  return loss * (count / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x [N, ...] over the valid rows, mask [N]; a scalar."""
  x = jnp.mean(x.reshape(len(x), -1), axis=1)
  total = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
  return jnp.sum(jnp.where(mask, x, 0.0)) / total


def direction_metrics(
  e: jax.Array, q: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Angle and norms of codes and their vectors, as means over a batch.

  docs/codebook_health.md says how to read them.

  Args:
    e: encoder outputs [N, D], float32.
    q: their codes [N, D], float32.
    mask: rows to average [N], bool; rows that are not finite are left out.

  Returns:
    mean_angle (degrees), fallback_share, encoder_norm and code_norm, float32
    scalars.
  """
  valid = valid_rows(e, mask)
  view = gradients.geometry(e, q)
  return {
    'mean_angle': jnp.rad2deg(masked_mean(view.angle, valid)),
    'fallback_share': masked_mean(view.no_rotation.astype(jnp.float32), valid),
    'encoder_norm': masked_mean(jnp.linalg.norm(e, axis=1), valid),
    'code_norm': masked_mean(jnp.linalg.norm(q, axis=1), valid),
  }
