"""How the decoder's gradient reaches the encoder through the quantizer.

Choosing the nearest code q of an encoder output e has no gradient. Each
estimator returns q, bit-exact, and replaces dq/de by its own linear map (paper
3.2). It is total: a vector gets its gradient unchanged if its norm or its
code's norm is under 1e-12, and in `rotate` also if it points away from its code
(no unique rotation).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MIN_NORM = 1e-12
EPS = float(jnp.finfo(jnp.float32).eps)


class Geometry(NamedTuple):
  """Directions of codes relative to their vectors; float32, constant.

  Attributes:
    u: e/|e|, [..., D].
    v: q/|q|, [..., D].
    scale: |q|/|e| before clipping, [..., 1].
    usable: both norms are at least `MIN_NORM`, [..., 1], bool.
    antipodal: 1 + u.v is below the rounding of u and v, [..., 1], bool.
  """

  u: jax.Array
  v: jax.Array
  scale: jax.Array
  usable: jax.Array
  antipodal: jax.Array

  @property
  def angle(self) -> jax.Array:
    """Angle between e and q in radians, [..., 1]; 0 if undefined."""
    opposite = _norm(self.u - self.v)
    adjacent = _norm(self.u + self.v)
    return jnp.where(self.usable, 2 * jnp.arctan2(opposite, adjacent), 0.0)

  @property
  def no_rotation(self) -> jax.Array:
    """Whether `rotate` falls back to straight-through, [..., 1], bool."""
    return ~self.usable | self.antipodal


def _norm(x):
  return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _dot(x, y):
  return jnp.sum(x * y, axis=-1, keepdims=True)


def direction(x):
  """x/|x|, |x|/peak and peak = max |x_i|, without over- or underflow."""
  peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  x = x / jnp.where(peak > 0, peak, 1.0)
  length = _norm(x)
  return x / jnp.where(length > 0, length, 1.0), length, peak


def geometry(e: jax.Array, q: jax.Array) -> Geometry:
  """Directions, scale and degenerate cases of vectors and codes [..., D]."""
  e = jax.lax.stop_gradient(e).astype(jnp.float32)
  q = jax.lax.stop_gradient(q).astype(jnp.float32)
  u, e_length, e_peak = direction(e)
  v, q_length, q_peak = direction(q)
  usable = (e_length * e_peak >= MIN_NORM) & (q_length * q_peak >= MIN_NORM)
  peaks = jnp.where(usable, q_peak / jnp.where(usable, e_peak, 1.0), 1.0)
  lengths = jnp.where(usable, q_length / jnp.where(usable, e_length, 1.0), 1.0)
  s = u + v
  antipodal = usable & (0.5 * _dot(s, s) <= EPS)
  return Geometry(u, v, peaks * lengths, usable, antipodal)


def _reflect_along(axis, weight, x):
  """x - weight axis (axis.x): a Householder reflection at 2/|axis|^2."""
  return x - axis * (weight * _dot(axis, x))


def _rotation(de, e, q, max_scale):
  """lambda R de."""
  g = geometry(e, q)
  scale = jnp.where(g.no_rotation, 1.0, jnp.minimum(g.scale, max_scale))
  return _turned(de, g) * scale


def _rotation_unscaled(de, e, q, _):
  """R de."""
  return _turned(de, geometry(e, q))


def _turned(de: jax.Array, g: Geometry) -> jax.Array:
  """R de, R = (I - 2 w w^T)(I - 2 u u^T), w = (u + v)/|u + v|.

  The first reflection carries u onto -u, the second -u onto v. Two reflections
  stay orthogonal to rounding even near antipodes. A vector without rotation has
  both weights 0, so the backward pass needs no second [..., D] array.
  """
  s = g.u + g.v
  square = jnp.where(g.no_rotation, 1.0, _dot(s, s))
  turned = _reflect_along(g.u, jnp.where(g.no_rotation, 0.0, 2.0), de)
  return _reflect_along(s, jnp.where(g.no_rotation, 0.0, 2 / square), turned)


def _reflection(de, e, q, max_scale):
  """lambda (I - 2 r r^T) de; r = 0 if u and v agree up to rounding."""
  g = geometry(e, q)
  r = g.u - g.v
  square = _dot(r, r)
  apart = g.usable & (square > (2 * EPS) ** 2)
  weight = jnp.where(apart, 2 / jnp.where(apart, square, 1.0), 0.0)
  turned = _reflect_along(r, weight, de)
  return turned * jnp.where(g.usable, jnp.minimum(g.scale, max_scale), 1.0)


def _identity(de, *_):
  return de


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _pass_through(e, q, linear_map, max_scale):
  """q; its differential is linear_map(de) in e and 0 in q."""
  return q


@_pass_through.defjvp
def _pass_through_jvp(linear_map, max_scale, primals, tangents):
  e, q = primals
  tangent = linear_map(tangents[0].astype(jnp.float32), e, q, max_scale)
  return q, tangent.astype(q.dtype)


def _estimate(linear_map, e, q, max_scale=1.0):
  """Checks the arguments for `_pass_through`."""
  if not max_scale > 0:
    raise ValueError(
      f'expected max_scale > 0 (a bound on |q|/|e|), got {max_scale}; the '
      'default is 10'
    )
  if e.shape != q.shape or e.ndim < 1:
    raise ValueError(
      f'expected vectors and codes of one shape [..., D], got {e.shape} and '
      f'{q.shape}; gather the codes first: embedding[ids]'
    )
  return _pass_through(e, q, linear_map, max_scale)


def rotate(
  e: jax.Array, q: jax.Array, *, max_scale: float = 10.0, rescale: bool = True
) -> jax.Array:
  """q, whose gradient reaches e through the rotation that carries e onto q.

  With g = dL/d(quantized), u = e/|e| and v = q/|q|,

      dL/de  = lambda R^T g
      lambda = min(|q|/|e|, max_scale)
      R      = I - 2 w w^T + 2 v u^T,  w = (u + v)/|u + v|

  The paper's rotation and rescaling, in the form of Fifty et al., ICLR 2025
  (arXiv:2410.06424). No gradient reaches q. In the example q is twice as long
  as e and at a right angle to it: R^T turns g back and lambda doubles it.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from rvq_jax import rotate
  >>> e, q, g = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
  >>> rotate(e, q).tolist()
  [0.0, 2.0]
  >>> de = jax.grad(lambda e: g @ rotate(e, q))(e)
  >>> print(np.asarray(de).round(3))
  [ 2. -6.]

  Args:
    e: encoder outputs [..., D], any float dtype.
    q: their codes [..., D].
    max_scale: upper bound of lambda, > 0.
    rescale: False: lambda = 1, only the rotation.

  Returns:
    q, unchanged, [..., D] in q's dtype.

  Raises:
    ValueError: the shapes differ or max_scale is not positive.
  """
  linear_map = _rotation if rescale else _rotation_unscaled
  return _estimate(linear_map, e, q, max_scale)


def reflect(
  e: jax.Array, q: jax.Array, *, max_scale: float = 10.0
) -> jax.Array:
  """q, whose gradient reaches e through one Householder reflection (eq. 4).

  With g = dL/d(quantized), u = e/|e|, v = q/|q| and lambda as in `rotate`,

      dL/de = lambda (g - 2 r (r.g)),  r = (u - v)/|u - v|

  The paper's literal equation. It carries e onto q as the rotation does, but
  the gradient along u - v changes sign, however near e is to q. Arguments and
  errors as in `rotate`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from rvq_jax import reflect
  >>> e, q, g = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
  >>> de = jax.grad(lambda e: g @ reflect(e, q))(e)
  >>> print(np.asarray(de).round(3))
  [2. 6.]
  """
  return _estimate(_reflection, e, q, max_scale)


def straight_through(e: jax.Array, q: jax.Array) -> jax.Array:
  """q, whose gradient reaches e unchanged (eq. 7): dL/de = g.

  The usual e + stop_gradient(q - e) is q only up to rounding. Arguments and
  errors as in `rotate`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from rvq_jax import straight_through
  >>> e, q, g = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
  >>> jax.grad(lambda e: g @ straight_through(e, q))(e).tolist()
  [3.0, 1.0]
  """
  return _estimate(_identity, e, q)


def dynamic_ste(
  e: jax.Array,
  q: jax.Array,
  *,
  ids: jax.Array,
  num_codes: int,
  mask: jax.Array | None = None,
  axis_name: Any = None,
  **_: Any,
) -> jax.Array:
  """q, whose gradient reaches e more weakly the farther e is from q.

  With d_i = |e_i - q_i|^2 and the smallest d_j among the vectors of the same
  code, the Dynamic STE of StableVQ (2026) is

      dL/de_i = w_i g_i,  w_i = (min_j d_j + 1e-12)/(d_i + 1e-12)

  Args:
    e, q: encoder outputs and their codes [N, D], float32.
    ids: indices of the codes [N], int32.
    num_codes: K.
    mask: rows that count for the minimum [N], bool; None: all finite ones.
    axis_name: mapped axis or axes, to take the minimum over.
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


def diveq(e: jax.Array, q: jax.Array, **_: Any) -> jax.Array:
  """q as e + |q - e| d with a constant direction d = (q - e)/|q - e|.

  DiVeQ (Vali et al. 2025, arXiv:2509.26469), without its noise:

      dL/de = (I - d d^T) g,  dL/dq = d d^T g

  So the codes need no further loss. If q = e, all of the gradient goes to e.
  """
  d = direction(jax.lax.stop_gradient(q - e))[0]
  moved = e + d * jnp.sum(d * (q - e), axis=-1, keepdims=True)
  return straight_through(moved, q)


# Name -> function of e, q [N, D] and the keywords ids [N], num_codes, mask [N],
# max_scale and axis_name; it returns q.
ESTIMATORS: dict[str, Callable[..., jax.Array]] = {
  'rotation': lambda e, q, max_scale, **_: rotate(e, q, max_scale=max_scale),
  'rotation_unscaled': lambda e, q, **_: rotate(e, q, rescale=False),
  'reflection': lambda e, q, max_scale, **_: reflect(e, q, max_scale=max_scale),
  'ste': lambda e, q, **_: straight_through(e, q),
  'dynamic_ste': dynamic_ste,
  'diveq': diveq,
}
