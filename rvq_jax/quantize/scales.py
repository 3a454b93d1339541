"""Grids of several sides for `MultiscaleQuantizer`: means, interpolation, phi.

Pure functions of float32 arrays.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 51, 64)


def default_sides(grid: int) -> tuple[int, ...]:
  """The sides of the scales of a grid: 8 has the sides 1, 2, 3, 4, 5, 6, 8."""
  return (*(side for side in _SIDES if side < grid), grid)


def token_offsets(sides) -> list[int]:
  """Where each scale begins among an image's tokens, and their number."""
  return [0, *itertools.accumulate(side**2 for side in sides)]


def token_weights(sides) -> np.ndarray:
  """The area that each token of an image covers, float32 [T], 1 on average."""
  tokens = token_offsets(sides)[-1]
  areas = [tokens / len(sides) / side**2 for side in sides]
  return np.float32(areas).repeat(np.square(sides))


def area_weights(grid: int, side: int) -> np.ndarray:
  """Share of each position in each of `side` cells, float32 [side, grid]."""
  edges, left = np.arange(side + 1) * grid / side, np.arange(grid)
  end = np.minimum(edges[1:, None], left + 1)
  overlap = np.maximum(end - np.maximum(edges[:-1, None], left), 0)
  return np.float32(overlap * side / grid)


def bicubic_weights(side: int, grid: int) -> np.ndarray:
  """Weight of each of `side` cells at each position, float32 [grid, side].

  Keys' kernel, a = -1/2, divided by its sum at the edges, as in
  `jax.image.resize`, which would compile a program for each side.
  """
  at = (np.arange(grid)[:, None] + 0.5) * side / grid - 0.5
  t = abs(at - np.arange(side))
  near, far = (1.5 * t - 2.5) * t**2 + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
  weights = np.where(t < 1, near, np.where(t < 2, far, 0))
  return np.float32(weights / weights.sum(1, keepdims=True))


def _resize(x, weights):
  """x [B, h, w, D] along both sides by weights [n, h], in float32."""
  if weights.shape[0] == weights.shape[1]:
    return x
  for axes in 'nh,bhwd->bnwd', 'nw,bhwd->bhnd':
    x = jnp.einsum(axes, weights, x, precision=jax.lax.Precision.HIGHEST)
  return x


def pool(
  z: jax.Array, mask: jax.Array, side: int
) -> tuple[jax.Array, jax.Array]:
  """Means over side^2 areas of z [B, n, n, D] in the mask [B, n, n].

  Returns:
    [B, side^2, D]; and the valid share of each area, [B, side^2] in [0, 1].
  """
  weights, mask = area_weights(z.shape[1], side), mask[..., None]
  total = _resize(jnp.where(mask, z, 0.0), weights)
  share = _resize(mask.astype(jnp.float32), weights)
  share = jnp.where(share > 1 - 1e-5, 1.0, share)  # up to rounding
  e = total / jnp.where(share == 0, 1.0, share)
  return e.reshape(len(z), -1, z.shape[-1]), share.reshape(len(z), -1)


def expand(q: jax.Array, grid: int) -> jax.Array:
  """Codes [B, side^2, D] on the whole grid, bicubic: [B, grid, grid, D]."""
  side = round(q.shape[1] ** 0.5)
  x = q.reshape(len(q), side, side, q.shape[-1])
  return _resize(x, bicubic_weights(side, grid))


def phi(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """(x + conv3x3(x)) / 2 of x [B, n, n, D]."""
  y = jax.lax.conv_general_dilated(
    *(x, params['kernel'], (1, 1), 'SAME'),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,  # finer ids depend on it
  )
  return 0.5 * (x + (y + params['bias'][None, None, None]))


def identity_phi(key, dim: int) -> dict[str, jax.Array]:
  """kernel [3, 3, D, D] and bias [D] of a phi that changes nothing."""
  del key
  kernel = jnp.zeros((3, 3, dim, dim)).at[1, 1].set(jnp.eye(dim))
  return {'kernel': kernel, 'bias': jnp.zeros(dim)}


def pyramid(
  z: jax.Array, mask: jax.Array, sides: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """The inputs of all scales without quantization, phi being the identity.

  z is [B, n, n, D], the mask bool [B, n, n]. Returns [B, T, D] and the valid
  share [B, T], as `pool`.
  """
  scales = []
  for side in sides:
    scales.append(pool(z, mask, side))
    z = z - expand(scales[-1][0], z.shape[1])
  rows, share = (jnp.concatenate(x, axis=1) for x in zip(*scales, strict=True))
  return rows, share
