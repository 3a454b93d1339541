"""Grids of several sides for `MultiscaleQuantizer`: means, interpolation, phi.

Pure functions of float32 arrays.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PHIS = 4  # at most so many convolutions phi; neighbouring scales share one
RESIZES = ('keys', 'torch')
_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 51, 64)


def default_sides(grid: int) -> tuple[int, ...]:
  """The sides of the scales of a grid: 8 has the sides 1, 2, 3, 4, 5, 6, 8."""
  return (*(side for side in _SIDES if side < grid), grid)


def token_offsets(sides: Sequence[int]) -> list[int]:
  """Index of each scale's first token in an image, and the number of tokens."""
  return [0, *itertools.accumulate(side**2 for side in sides)]


def token_weights(sides: Sequence[int]) -> np.ndarray:
  """The area that each token of an image covers, float32 [T], 1 on average."""
  tokens = token_offsets(sides)[-1]
  areas = [tokens / len(sides) / side**2 for side in sides]
  return np.array(areas, np.float32).repeat(np.square(sides))


def area_weights(grid: int, side: int, resize: str = 'keys') -> np.ndarray:
  """Share of each position in each of `side` cells, float32 [side, grid].

  'torch': a cell holds every position that it touches, with equal weights.
  """
  edges, left = np.arange(side + 1) * grid / side, np.arange(grid)
  end = np.minimum(edges[1:, None], left + 1)
  overlap = np.maximum(end - np.maximum(edges[:-1, None], left), 0)
  if resize == 'torch':
    overlap = overlap > 0
    return np.asarray(overlap / overlap.sum(1, keepdims=True), np.float32)
  return np.asarray(overlap * side / grid, np.float32)


def bicubic_weights(side: int, grid: int, resize: str = 'keys') -> np.ndarray:
  """Weight of each of `side` cells at each position, float32 [grid, side].

  Keys' kernel, a = -1/2, divided by its sum at the edges, as in
  `jax.image.resize`, which would compile a program per side. 'torch': a = -3/4,
  and the edge cells repeat beyond the edges.
  """
  a, cells = -0.5, np.arange(side)
  if resize == 'torch':
    a, cells = -0.75, np.arange(-2, side + 2)
  at = (np.arange(grid)[:, None] + 0.5) * side / grid - 0.5
  t = abs(at - cells)
  near = ((a + 2) * t - (a + 3)) * t**2 + 1
  far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
  weights = np.where(t < 1, near, np.where(t < 2, far, 0))
  weights = weights @ (cells.clip(0, side - 1)[:, None] == np.arange(side))
  return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def phi_indices(scales: int, resize: str = 'keys') -> list[int]:
  """The index of each scale's convolution.

  'torch': as in VAR, the convolution with the nearest tick in [0, 1].
  """
  phis, numbers = min(PHIS, scales), range(scales)
  if resize == 'keys':
    return [number * phis // scales for number in numbers]
  edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
  ticks, last = np.linspace(edge, 1 - edge, phis), max(scales - 1, 1)
  return [int(np.argmin(abs(ticks - number / last))) for number in numbers]


def _resize(x, weights):
  """x [B, h, w, D] along both sides by weights [n, h], in float32."""
  if weights.shape[0] == weights.shape[1]:
    return x
  for axes in 'nh,bhwd->bnwd', 'nw,bhwd->bhnd':
    x = jnp.einsum(axes, weights, x, precision=jax.lax.Precision.HIGHEST)
  return x


def pool(
  z: jax.Array, mask: jax.Array, side: int, resize: str = 'keys'
) -> tuple[jax.Array, jax.Array]:
  """Means over side^2 areas of z [B, n, n, D] in the mask [B, n, n].

  Returns:
    [B, side^2, D]; and the valid share of each area, [B, side^2] in [0, 1].
  """
  weights, mask = area_weights(z.shape[1], side, resize), mask[..., None]
  total = _resize(jnp.where(mask, z, 0.0), weights)
  share = _resize(mask.astype(jnp.float32), weights)
  share = jnp.where(share > 1 - 1e-5, 1.0, share)  # up to rounding
  e = total / jnp.where(share == 0, 1.0, share)
  return e.reshape(len(z), -1, z.shape[-1]), share.reshape(len(z), -1)


def expand(q: jax.Array, grid: int, resize: str = 'keys') -> jax.Array:
  """Codes [B, side^2, D] on the whole grid, bicubic: [B, grid, grid, D]."""
  side = round(q.shape[1] ** 0.5)
  x = q.reshape(len(q), side, side, q.shape[-1])
  return _resize(x, bicubic_weights(side, grid, resize))


def phi(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """(x + conv3x3(x)) / 2 of x [B, n, n, D]."""
  y = jax.lax.conv_general_dilated(
    *(x, params['kernel'], (1, 1), 'SAME'),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,  # finer ids depend on it
  )
  return 0.5 * (x + (y + params['bias'][None, None, None]))


def identity_phi(key: jax.Array, dim: int) -> dict[str, jax.Array]:
  """kernel [3, 3, D, D] and bias [D] of the identity."""
  del key
  kernel = jnp.zeros((3, 3, dim, dim)).at[1, 1].set(jnp.eye(dim))
  return {'kernel': kernel, 'bias': jnp.zeros(dim)}


def pyramid(
  z: jax.Array, mask: jax.Array, sides: tuple[int, ...], resize: str = 'keys'
) -> tuple[jax.Array, jax.Array]:
  """The inputs of all scales without quantization, phi being the identity.

  z is [B, n, n, D], the mask bool [B, n, n]. Returns [B, T, D] and the valid
  share [B, T], as in `pool`.
  """
  scales = []
  for side in sides:
    scales.append(pool(z, mask, side, resize))
    z = z - expand(scales[-1][0], z.shape[1], resize)
  rows, share = (jnp.concatenate(x, axis=1) for x in zip(*scales, strict=True))
  return rows, share
