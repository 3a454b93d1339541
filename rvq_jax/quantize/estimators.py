"""The estimators by name, and two that look at more than e and q.

Like the ones in `gradients` they return q, bit-exact, and differ in gradient.
"""

import jax
import jax.numpy as jnp

from rvq_jax.quantize.gradients import (
  MIN_NORM,
  direction,
  reflect,
  rotate,
  straight_through,
)


def dynamic_ste(
  e: jax.Array,
  q: jax.Array,
  *,
  ids: jax.Array,
  num_codes: int,
  mask: jax.Array | None = None,
  axis_name=None,
) -> jax.Array:
  """q, whose gradient reaches e more weakly the farther e is from q.

  With d_i = |e_i - q_i|^2 and the smallest d_j among the vectors of the same
  code,

      dL/de_i = w_i g_i,  w_i = (min_j d_j + 1e-12)/(d_i + 1e-12)

  the Dynamic STE of StableVQ (2026). Vectors out of `mask`, and those that are
  not finite, do not count for the minimum.

  Args:
    e: encoder outputs [N, D], float32.
    q: their codes [N, D].
    ids: indices of the codes [N], int32.
    num_codes: K.
    mask: valid rows [N], bool; all if None.
    axis_name: mapped axis or axes, to take the minimum over.

  Returns:
    q, unchanged.
  """
  distance = jnp.sum(jax.lax.stop_gradient(e - q) ** 2, axis=-1)
  counted = jnp.isfinite(distance)
  if mask is not None:
    counted &= mask
  least = jnp.full(num_codes, jnp.inf)
  least = least.at[ids].min(jnp.where(counted, distance, jnp.inf))
  if axis_name is not None:
    least = jax.lax.pmin(least, axis_name)
  nearest = jnp.minimum(least[ids], distance)
  weight = (nearest + MIN_NORM) / (distance + MIN_NORM)
  return straight_through(weight[:, None] * e, q)


def diveq(e: jax.Array, q: jax.Array) -> jax.Array:
  """q as e + |q - e| d with a constant direction d = (q - e)/|q - e|.

  DiVeQ (Vali et al. 2025, arXiv:2509.26469), without its noise:

      dL/de = (I - d d^T) g,  dL/dq = d d^T g

  The part of the gradient along the quantization error trains the code, the
  rest trains the encoder; no further loss is needed. Where q = e all of it goes
  to e. Arguments as in `rotate`.
  """
  d = direction(jax.lax.stop_gradient(q - e))[0]
  return straight_through(
    e + d * jnp.sum(d * (q - e), axis=-1, keepdims=True), q
  )


# Estimator -> function of e, q [N, D] and, by name, ids [N], num_codes, mask
# [N], max_scale and axis_name, to q.
ESTIMATORS = {
  'rotation': lambda e, q, *, max_scale, **_: rotate(e, q, max_scale=max_scale),
  'rotation_unscaled': lambda e, q, **_: rotate(e, q, rescale=False),
  'reflection': lambda e, q, *, max_scale, **_: reflect(
    e, q, max_scale=max_scale
  ),
  'ste': lambda e, q, **_: straight_through(e, q),
  'dynamic_ste': lambda e, q, *, max_scale, **cells: dynamic_ste(e, q, **cells),
  'diveq': lambda e, q, **_: diveq(e, q),
}
