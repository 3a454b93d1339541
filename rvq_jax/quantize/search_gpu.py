"""The nearest-code search as one fused GPU kernel (Pallas, Triton).

A program scores one block of rows against its share of the codes, a tile at a
time, and keeps a running maximum: no score leaves the chip. Where there are too
few row blocks to fill the device, the codes are split over several programs,
and what they found is merged outside.

Not measured on a GPU yet, so `nearest_codes` does not choose it by itself; the
block sizes are those usual for a float32 matmul of this form. Three limits:

- `pallas_call` is not partitioned by the compiler: over several devices call it
  in `shard_map`.
- Triton is asked for by name, since the default of `pallas_call` differs
  between jax versions. jax 0.11 lowers it with a DeprecationWarning.
- It keeps one candidate a row: no `rerank`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS, CODES, DEPTH = 128, 128, 32  # the block of one matmul; powers of two
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100


def fused_argmax(
  e: jax.Array,
  codes: jax.Array,
  bias: jax.Array,
  *,
  precision: jax.lax.PrecisionLike = None,
  interpret: bool | None = None,
) -> jax.Array:
  """argmax over k of e.c_k + bias_k, lowest index on a tie.

  With bias -|c|^2 / 2 this is the nearest code (paper eq. 3).

  Args:
    e: vectors [N, D], float32 and finite, N >= 1.
    codes: codes [K, D], float32 and finite, K >= 1.
    bias: [K], float32, finite or -inf (then the code is never chosen).
    precision: of the matmul. None or DEFAULT is TF32, HIGHEST is float32.
    interpret: run as plain JAX. None: where there is no GPU.

  Returns:
    ids [N], int32.
  """
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  n, dim = e.shape
  rows = min(ROWS, max(16, pl.next_power_of_2(n)))
  depth = min(DEPTH, max(16, pl.next_power_of_2(dim)))
  blocks = pl.cdiv(n, rows)
  tiles = pl.cdiv(codes.shape[0], CODES)
  splits = min(tiles, max(1, PROGRAMS // blocks))
  tiles = pl.cdiv(tiles, splits)  # from here on those of one program
  padded = tiles * splits * CODES - codes.shape[0]
  e = jnp.pad(e, ((0, -n % rows), (0, -dim % depth)))
  codes = jnp.pad(codes, ((0, padded), (0, -dim % depth)))
  bias = jnp.pad(bias, (0, padded), constant_values=-jnp.inf)
  out = pl.BlockSpec((None, rows), lambda i, j: (j, i))
  shape = (splits, blocks * rows)
  scores, ids = pl.pallas_call(
    functools.partial(
      _search_block, tiles=tiles, depth=depth, precision=precision
    ),
    grid=(blocks, splits),
    in_specs=[
      pl.BlockSpec((rows, e.shape[1]), lambda i, j: (i, 0)),
      pl.BlockSpec((tiles * CODES, e.shape[1]), lambda i, j: (j, 0)),
      pl.BlockSpec((tiles * CODES,), lambda i, j: (j,)),
    ],
    out_specs=[out, out],
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.int32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    interpret=interpret,
    name='nearest_codes',
  )(e, codes, bias)
  best = scores == jnp.max(scores, axis=0, keepdims=True)
  last = jnp.iinfo(jnp.int32).max
  return jnp.min(jnp.where(best, ids, last), axis=0)[:n]


def _search_block(
  e_ref, codes_ref, bias_ref, score_ref, id_ref, *, tiles, depth, precision
):
  """Best code of a block of rows [R, D] among `tiles` tiles of codes."""
  rows, dim = e_ref.shape
  lanes = jax.lax.broadcasted_iota(jnp.int32, (rows, CODES), 1)
  base = pl.program_id(1) * (tiles * CODES)

  def visit(t, best):
    best_score, best_id = best
    first = t * CODES
    tile = pl.ds(first, CODES)

    def accumulate(d, score):
      part = pl.ds(d * depth, depth)
      return score + jax.lax.dot_general(
        e_ref[:, part],
        codes_ref[tile, part],
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
      )

    score = jnp.zeros((rows, CODES), jnp.float32)
    score = jax.lax.fori_loop(0, dim // depth, accumulate, score)
    score = score + bias_ref[tile][None, :]
    top = jnp.max(score, axis=1)
    lane = jnp.min(jnp.where(score == top[:, None], lanes, CODES), axis=1)
    better = top > best_score
    best_id = jnp.where(better, base + first + lane, best_id)
    return jnp.where(better, top, best_score), best_id

  start = jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.int32)
  score_ref[...], id_ref[...] = jax.lax.fori_loop(0, tiles, visit, start)
