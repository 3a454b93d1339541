"""Exact nearest-code search without an N x K array (paper eq. 3)."""

import jax
import jax.numpy as jnp

ROWS, CODES = 2048, 1024


def nearest_codes(e: jax.Array, embedding: jax.Array) -> jax.Array:
  """Index of the code nearest to each row by squared distance.

  |e - c|^2 = |e|^2 - 2 (e.c - |c|^2 / 2), so the nearest code has the highest
  score e.c - |c|^2 / 2. Ties go to the lowest index.

  Args:
    e: vectors [N, D].
    embedding: codes [K, D].

  Returns:
    ids [N], int32.
  """
  n, dim = e.shape
  k = embedding.shape[0]
  rows, codes = min(ROWS, n), min(CODES, k)
  e = jnp.pad(e.astype(jnp.float32), ((0, -n % rows), (0, 0)))
  embedding = embedding.astype(jnp.float32)
  bias = jnp.pad(
    -0.5 * jnp.sum(embedding**2, axis=1),
    (0, -k % codes),
    constant_values=-jnp.inf,
  ).reshape(-1, codes)
  tiles = jnp.pad(embedding, ((0, -k % codes), (0, 0))).reshape(-1, codes, dim)
  lanes = jnp.arange(codes, dtype=jnp.int32)

  def search_rows(block):
    def visit(best, tile):
      best_score, best_id = best
      first, code, offset = tile
      score = block @ code.T + offset[None]
      top = jnp.max(score, axis=1)
      lane = jnp.min(jnp.where(score == top[:, None], lanes[None], codes), 1)
      better = top > best_score
      best_id = jnp.where(better, first + lane, best_id)
      return (jnp.maximum(top, best_score), best_id), None

    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.int32))
    first = jnp.arange(tiles.shape[0], dtype=jnp.int32) * codes
    return jax.lax.scan(visit, start, (first, tiles, bias))[0][1]

  return jax.lax.map(search_rows, e.reshape(-1, rows, dim)).reshape(-1)[:n]
