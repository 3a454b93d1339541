"""Where codes come from: filling a codebook, splitting large clusters.

Pure functions of float32 arrays. With `axis_name` the candidates are those of
the global batch (`pmap`, `shard_map`).
"""

import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import Codebook, valid_rows


def draw_rows(
  key: jax.Array,
  x: jax.Array,
  count: int,
  *,
  weight: jax.Array | None = None,
  axis_name=None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`count` different rows of the global batch, drawn at random.

  The draw depends on the key and the global batch alone, so 1 device and 8
  draw the same rows. Each device contributes the rows that it holds; what
  travels is [count, D] and one number a row, never the batch.

  Args:
    key: the same random key on every device.
    x: vectors [N, D]; this device's share when axis_name is given.
    count: rows to draw, at most the size of the global batch.
    weight: chance of each row in relation to the others [N]; None: all alike.
    axis_name: mapped axis or axes of the batch.
    mask: rows that may be drawn [N], bool; all finite ones if None.

  Returns:
    The rows [count, D] and whether each may be used, bool [count]: False where
    fewer than `count` rows may be drawn.
  """
  rows, usable = draw_places(
    key, x, count, weight=weight, axis_name=axis_name, mask=mask
  )
  if axis_name is None:
    # x[rows] by a scatter: where `jit` has split x over devices, each puts its
    # own rows and [count, D] is summed; a gather would bring all of x to all.
    slot = jnp.full(x.shape[0], count).at[rows].set(jnp.arange(count))
    mine = jnp.where(valid_rows(x, mask)[:, None], x, 0.0)
    drawn = jnp.zeros((count, x.shape[1]), x.dtype)
    return drawn.at[slot].add(mine, mode='drop'), usable
  return fetch_rows(x, rows, usable, axis_name), usable


def draw_places(
  key, x, count: int, *, weight=None, axis_name=None, mask=None
) -> tuple[jax.Array, jax.Array]:
  """Where in the global batch the rows of `draw_rows` are.

  Takes its arguments.

  Returns:
    places [count], int32, and whether each may be used, bool [count].
  """
  n = x.shape[0]
  total = _global_rows(x, axis_name)
  first = 0 if axis_name is None else n * jax.lax.axis_index(axis_name)
  # The `count` largest of log weight + Gumbel noise are a draw without
  # repetition in proportion to the weights.
  noise = jax.random.gumbel(key, (total,))
  score = jax.lax.dynamic_slice_in_dim(noise, first, n)
  if weight is not None:
    score += jnp.log(jnp.maximum(weight, jnp.finfo(jnp.float32).tiny))
  score = jnp.where(valid_rows(x, mask), score, -jnp.inf)
  if axis_name is not None:
    everyone = jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros_like(noise), score, first, 0
    )
    score = jax.lax.psum(everyone, axis_name)
  best, places = jax.lax.top_k(score, count)
  return places, best > -jnp.inf


def fetch_rows(x, places, usable, axis_name) -> jax.Array:
  """Rows of the global batch by their places; zeros where not usable.

  Args:
    x: this device's share of the batch [N, D].
    places: in the global batch [M], int32.
    usable: which to fetch [M], bool.
    axis_name: mapped axis or axes of the batch.

  Returns:
    [M, D], the same on every device along axis_name.
  """
  n = x.shape[0]
  local = places - n * jax.lax.axis_index(axis_name)
  here = (local >= 0) & (local < n) & usable
  mine = jnp.where(here[:, None], x[jnp.clip(local, 0, n - 1)], 0.0)
  return jax.lax.psum(mine, axis_name)


def assign(cluster_size, dead, usable) -> tuple[jax.Array, jax.Array]:
  """The least used dead code takes the first row, and so on.

  Args:
    cluster_size: [K].
    dead: codes to move, bool [K].
    usable: rows that may be taken, bool [M].

  Returns:
    source [K], the row that each code would take, and placed, bool [K].
  """
  k, count = dead.shape[0], usable.shape[0]
  order = jnp.argsort(jnp.where(dead, cluster_size, jnp.inf))
  rank = jnp.zeros(k, jnp.int32).at[order].set(jnp.arange(k, dtype=jnp.int32))
  source = jnp.minimum(rank, count - 1)
  return source, dead & (rank < count) & usable[source]


def put(codebook, placed, rows, size) -> Codebook:
  """The codebook with rows [K, D] where placed [K], of that cluster_size."""
  return jax.tree.map(
    lambda new, old: jnp.where(
      placed.reshape((-1,) + (1,) * (old.ndim - 1)), new, old
    ),
    Codebook.create(rows, size),
    codebook,
  )


def _place(codebook, dead, rows, usable, size):
  source, placed = assign(codebook.cluster_size, dead, usable)
  codebook = put(codebook, placed, rows[source], size)
  return codebook, jnp.sum(placed.astype(jnp.int32))


def _global_rows(e, axis_name):
  return e.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))


def fill_codebook(
  codebook: Codebook,
  key: jax.Array,
  e: jax.Array,
  *,
  expected_size,
  axis_name=None,
  mask: jax.Array | None = None,
) -> Codebook:
  """Puts codes onto vectors of a first batch (data-dependent initialisation).

  With fewer vectors than codes the rest keep their place and a cluster_size of
  zero: they are dead, and `replace_codes` moves them.

  Args:
    codebook: K codes of D numbers; cluster_size is zero everywhere.
    key: random key, the same on every device.
    e: vectors [N, D]; this device's share when axis_name is given.
    expected_size: cluster_size that a filled code starts with.
    axis_name: mapped axis or axes of the batch.
    mask: rows that may be drawn [N], bool.

  Returns:
    The codebook.
  """
  k = codebook.cluster_size.shape[0]
  e = jax.lax.stop_gradient(e).astype(jnp.float32)
  rows, usable = draw_rows(
    key, e, min(k, _global_rows(e, axis_name)), axis_name=axis_name, mask=mask
  )
  return _place(codebook, jnp.ones(k, bool), rows, usable, expected_size)[0]


def replace_codes(
  codebook: Codebook,
  dead: jax.Array,
  key: jax.Array,
  e: jax.Array,
  ids: jax.Array,
  *,
  expected_size,
  step: float = 0.2,
  axis_name=None,
  mask: jax.Array | None = None,
) -> tuple[Codebook, jax.Array]:
  """Lets dead codes split the clusters of codes that are used too much.

  A dead code goes to c + step (e - c), where e is a vector of the batch drawn
  in proportion to the cluster_size of its code c: close to c, so that the two
  share the cluster evenly and the moving average then pulls them apart. A code
  put onto e itself (step = 1) is as far from the other vectors of the cluster
  as they are from each other, c stays nearest to most of them, and the code
  soon dies again. The choice is measured in docs/results.md.

  A batch of N vectors replaces at most N codes, the least used first; the rest
  stay as they are until the next call.

  Args:
    codebook: K codes of D numbers.
    dead: codes to replace, bool [K].
    key: random key, the same on every device.
    e: vectors [N, D]; this device's share when axis_name is given.
    ids: their codes [N].
    expected_size: cluster_size that a replaced code starts with.
    step: how far from the code c to the vector e, in (0, 1].
    axis_name: mapped axis or axes of the batch.
    mask: rows that may be drawn [N], bool.

  Returns:
    The codebook, and how many codes were replaced (int32 scalar).
  """
  k = codebook.cluster_size.shape[0]
  e = jax.lax.stop_gradient(e).astype(jnp.float32)
  parent = codebook.embedding[ids]
  rows, usable = draw_rows(
    key,
    parent + step * (e - parent),
    min(k, _global_rows(e, axis_name)),
    weight=codebook.cluster_size[ids],
    axis_name=axis_name,
    mask=mask,
  )
  return _place(codebook, dead, rows, usable, expected_size)
