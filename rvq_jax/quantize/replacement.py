"""Fills a codebook from a batch, and splits clusters that are too large.

Pure functions of float32 arrays. With `axis_name` they draw vectors from the
global batch (`pmap`, `shard_map`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import Axis, Codebook, row_weights


def draw_rows(
  key: jax.Array,
  x: jax.Array,
  count: int,
  *,
  weight: jax.Array | None = None,
  axis_name: Any = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws `count` different rows of the global batch at random.

  The `count` largest of log weight + Gumbel noise are a draw without repetition
  in proportion to the weights. The key and the global batch decide, so 1 device
  and 8 draw the same rows. Each device first takes its own `count` largest, so
  the communication does not grow with the batch.

  Args:
    key: the same random key on every device.
    x: vectors [N, D]; this device's share when axis_name is given.
    count: rows to draw, at most the size of the global batch.
    weight: relative probability of each row [N]; None: uniform.
    axis_name: mapped axis or axes of the batch.
    mask: eligible rows [N], bool; None: all finite ones. Or weights [N], at
      least 0, which multiply `weight`.

  Returns:
    The rows [count, D], and bool [count]: False for surplus rows, if fewer than
    `count` are eligible.
  """
  n, axis = len(x), Axis(axis_name)
  first = n * axis.rank
  counts_for = row_weights(x, mask)
  valid = counts_for > 0
  noise = jax.random.gumbel(key, (n * axis.size,))
  score = jax.lax.dynamic_slice_in_dim(noise, first, n)
  for factor in (counts_for, weight):
    if factor is not None:
      score += jnp.log(jnp.maximum(factor, jnp.finfo(jnp.float32).tiny))
  best, drawn = _largest(jnp.where(valid, score, -jnp.inf), count, axis)
  # x[drawn] by a scatter: each device puts its own rows, and psum adds the
  # [count, D]. If `jit` has split x, a gather would copy it to all devices.
  local = drawn - first
  local = jnp.where((local >= 0) & (local < n), local, n)
  slot = jnp.full(n, count).at[local].set(jnp.arange(count), mode='drop')
  rows = jnp.zeros((count, x.shape[1]), x.dtype)
  rows = rows.at[slot].add(jnp.where(valid[:, None], x, 0.0), mode='drop')
  return axis.psum(rows), best > -jnp.inf


def _largest(score, count, axis):
  """The `count` largest of the global [N] and their indices, largest first.

  Each share takes its own largest first. Under `jit` the shares are an even
  split over all devices; another split gives the same result.
  """
  n, shares = len(score), jax.device_count()
  if axis.name is None and (shares == 1 or n % shares):
    return jax.lax.top_k(score, count)
  if axis.name is None:
    # Sort: XLA gathers the operand of a top_k.
    indices = jnp.arange(n, dtype=jnp.int32).reshape(shares, -1)
    best, indices = (
      x[:, :count].reshape(-1)
      for x in jax.lax.sort((-score.reshape(shares, -1), indices), num_keys=1)
    )
    best = -best
  else:
    best, indices = jax.lax.top_k(score, min(count, n))
    best, indices = (_gather(x, axis) for x in (best, indices + n * axis.rank))
  best, order = jax.lax.top_k(best, count)
  return best, indices[order]


def _gather(x, axis):
  """x [n] of all shares in order: an all-gather that `shard_map` accepts."""
  everyone, first = jnp.zeros(len(x) * axis.size, x.dtype), len(x) * axis.rank
  return axis.psum(jax.lax.dynamic_update_slice_in_dim(everyone, x, first, 0))


def _place(codebook, dead, rows, usable, size):
  """Puts dead codes onto rows, least used first; returns also their number."""
  k, count = len(dead), len(rows)
  order = jnp.argsort(jnp.where(dead, codebook.cluster_size, jnp.inf))
  rank = jnp.zeros(k, jnp.int32).at[order].set(jnp.arange(k, dtype=jnp.int32))
  source = jnp.minimum(rank, count - 1)
  placed = dead & (rank < count) & usable[source]
  codebook = jax.tree.map(
    lambda new, old: jnp.where(
      placed.reshape((-1,) + (1,) * (old.ndim - 1)), new, old
    ),
    Codebook.create(rows[source], size),
    codebook,
  )
  return codebook, jnp.sum(placed.astype(jnp.int32))


def _cell_means(x, ids, k, weight, axis_name):
  """Weighted mean of x [N] over the rows of each code [K]; 0 without rows."""
  rows = jnp.stack([x, jnp.ones_like(x)], axis=1) * weight[:, None]
  rows = jnp.where(weight[:, None] > 0, rows, 0.0)
  sums = Axis(axis_name).psum(jnp.zeros((k, 2)).at[ids].add(rows))
  return sums[:, 0] / jnp.where(sums[:, 1] > 0, sums[:, 1], 1.0)


def fill_codebook(
  codebook: Codebook,
  key: jax.Array,
  e: jax.Array,
  *,
  expected_size: float | jax.Array,
  axis_name: Any = None,
  mask: jax.Array | None = None,
) -> Codebook:
  """Puts codes onto vectors of a first batch (data-dependent initialisation).

  A codebook with any cluster_size above zero stays unchanged. If there are
  fewer vectors than codes, the other codes keep their place and cluster_size 0.

  Args:
    codebook: K codes of D dimensions.
    key, e, axis_name, mask: as key, x, axis_name and mask of `draw_rows`.
    expected_size: initial cluster_size of a filled code.
  """
  k = codebook.cluster_size.shape[0]
  e = jax.lax.stop_gradient(e).astype(jnp.float32)

  def fill(codebook):
    count = min(k, len(e) * Axis(axis_name).size)
    rows, usable = draw_rows(key, e, count, axis_name=axis_name, mask=mask)
    return _place(codebook, jnp.ones(k, bool), rows, usable, expected_size)[0]

  empty = jnp.sum(codebook.cluster_size) == 0
  return jax.lax.cond(empty, fill, lambda codebook: codebook, codebook)


def replace_codes(
  codebook: Codebook,
  dead: jax.Array,
  key: jax.Array,
  e: jax.Array,
  ids: jax.Array,
  *,
  expected_size: float | jax.Array,
  split_by: str = 'count',
  split_fraction: float = 0.2,
  axis_name: Any = None,
  mask: jax.Array | None = None,
) -> tuple[Codebook, jax.Array]:
  """Lets dead codes split the clusters of overused codes.

  A dead code moves to c + split_fraction (e - c), where e is a vector of the
  batch drawn in proportion to the cluster_size of its code c. So close to c,
  the two share the cluster evenly and the moving average pulls them apart. On e
  itself the code would soon die again: c stays nearest to most vectors of the
  cluster (docs/results.md). A batch of N vectors replaces at most N codes, the
  least used first.

  Args:
    codebook: K codes of D dimensions.
    dead: codes to replace, bool [K].
    key, e, axis_name, mask: as key, x, axis_name and mask of `draw_rows`.
    ids: codes of the vectors e, [N].
    expected_size: initial cluster_size of a replaced code.
    split_by: 'count'; or 'distortion', which multiplies the cluster_size of c
      by the mean squared error of its vectors. So the draw splits a code with N
      vectors in proportion to N^2, or N^2 times that error; at high rate the
      best codebook has codes of equal distortion (Gersho 1979), which it splits
      in proportion to N. Without the square the error of 16 dimensions of
      photographs' patches is the same within 0.05 dB.
    split_fraction: share of the way from the code c to the vector e, in (0, 1].

  Returns:
    The codebook, and the number of replaced codes (int32 scalar).
  """
  k = codebook.cluster_size.shape[0]
  e = jax.lax.stop_gradient(e).astype(jnp.float32)
  parent = codebook.embedding[ids]
  weight = codebook.cluster_size
  if split_by == 'distortion':
    error = jnp.sum((e - parent) ** 2, axis=1)
    weight *= _cell_means(error, ids, k, row_weights(e, mask), axis_name)
  rows, usable = draw_rows(
    key,
    parent + split_fraction * (e - parent),
    min(k, len(e) * Axis(axis_name).size),
    weight=weight[ids],
    axis_name=axis_name,
    mask=mask,
  )
  return _place(codebook, dead, rows, usable, expected_size)
