"""Nearest-code search in float32 without an N x K array (paper eq. 3).

The nearest code has the highest score e.c - |c|^2 / 2: one matmul and a running
maximum over tiles. Two things keep its rounding small for any finite input:

- the score cancels when the codes lie far from the origin, and distances do
  not change when e and c are translated together, so the mean of the codebook
  is subtracted from both (`centering`; a codebook around the origin stays);
- both are multiplied by a power of two where squares would leave the range of
  float32, which rounds nothing.

The search for the largest inner product leaves out |c|^2 / 2, and subtracts
nothing, since a translation would change the result.

The remaining rounding decides between codes whose distances from a row are
nearly equal relative to their distance from that mean; `search` marks these.
"""

import functools

import jax
import jax.numpy as jnp

_SAMPLE = 1024  # codes from which to estimate the mean of the codebook


@jax.jit
def nearest_codes(e: jax.Array, embedding: jax.Array) -> jax.Array:
  """Index of the code nearest to each row by squared distance.

  It computes in float32 on every backend, never TF32. With |e| and |c| measured
  from the mean of the codebook, the squared distance of the chosen code c
  exceeds the least by at most about 2^-23 (4 + sqrt(D)) |c| (|c| + |e|). Ties
  go to the lowest index. A row with NaN or Inf gets some valid id; a code with
  NaN or Inf is never chosen while another is finite. ids carry no gradient. If
  e is sharded by rows, with embedding replicated, no device gathers e.

  >>> import jax.numpy as jnp
  >>> from rvq_jax import nearest_codes
  >>> embedding = jnp.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
  >>> e = jnp.array([[0.2, 0.1], [2.5, 0.0], [0.9, 1.3]])
  >>> nearest_codes(e, embedding).tolist()
  [0, 2, 1]

  Args:
    e: vectors [N, D], cast to float32.
    embedding: codes [K, D], cast to float32.

  Returns:
    ids [N], int32.

  Raises:
    ValueError: the shapes do not fit, or K is 0.
  """
  return search(e, embedding)[0]


@functools.partial(jax.jit, static_argnames='inner')
def search(
  e: jax.Array, embedding: jax.Array, *, inner: bool = False
) -> tuple[jax.Array, jax.Array]:
  """As `nearest_codes`; also marks ambiguous rows.

  Args:
    e: vectors [N, D], cast to float32.
    embedding: codes [K, D], cast to float32.
    inner: choose by the largest inner product instead, up to about 2^-23
      (4 + sqrt(D)) |c| |e|, c being the longest code.

  Returns:
    ids [N], int32, and bool [N]: whether the two best scores of a row lie
    within their rounding errors, so that another code may be as near or nearer.
  """
  if e.ndim != 2 or embedding.ndim != 2 or e.shape[1] != embedding.shape[1]:
    raise ValueError(
      'nearest_codes expects e [N, D] and embedding [K, D], got '
      f'{e.shape} and {embedding.shape}.'
    )
  if len(embedding) == 0:
    raise ValueError('nearest_codes expects at least one code, got K = 0.')
  if len(e) == 0:
    return jnp.zeros(0, jnp.int32), jnp.zeros(0, bool)
  e = jax.lax.stop_gradient(e.astype(jnp.float32))
  embedding = jax.lax.stop_gradient(embedding.astype(jnp.float32))
  return jax.lax.platform_dependent(
    e,
    embedding,
    cpu=functools.partial(_search, inner=inner, backend='cpu'),
    default=functools.partial(_search, inner=inner, backend='gpu'),
  )


def _search(e, embedding, *, inner, backend):
  """Ids and ambiguity [N] of rows e [N, D], in the tiles of a backend."""
  shift, scale = centering(embedding)
  shift = jnp.zeros_like(shift) if inner else shift
  bias = _bias(embedding, shift, scale)
  # The length of a row does not change the order of its inner products.
  row_scale = jnp.float32(2.0**126) if inner else scale
  if inner:  # the longest code; a code that is not finite stays at -inf
    longest = jnp.sqrt(-2 * jnp.min(jnp.where(bias > -jnp.inf, bias, 0)))
    bias = jnp.where(bias > -jnp.inf, 0, bias)
  rows, codes = tile_sizes(len(e), len(embedding), backend)

  def search_rows(block):
    x = _center_rows(block, shift, row_scale)
    ids, gap = _best(x, embedding, bias, shift, scale, codes, backend)
    # Bound of two scores' rounding; measured: at most half of this each.
    norm = longest if inner else jnp.sqrt(-2 * bias[ids])
    length = jnp.linalg.norm(x, axis=1)
    error = norm * length if inner else norm * (norm + length)
    return ids, gap < 2.0**-24 * (4 + e.shape[1] ** 0.5) * error

  return _over_blocks(search_rows, e, rows)


def tile_sizes(n: int, k: int, backend: str) -> tuple[int, int]:
  """How many of n rows and k codes one tile scores.

  CPU: the tile is read twice after the matmul wrote it, so it has to stay in
  the second-level cache; 512 x 1024 (2 MiB) measured fastest, and few rows take
  more codes to keep the matmul long. GPU and TPU: a tile is one kernel launch,
  so it has to fill the device; 16384 x 2048 is 128 MiB. A size just over the
  limit gives two halves, not one full and one almost empty tile.
  """
  rows, scores = (512, 2**19) if backend == 'cpu' else (16384, 2**25)
  rows = _even(n, rows)
  return rows, _even(k, scores // min(rows, scores // 1024))


def _even(size, limit):
  """A tile of at most about `limit` that splits `size` evenly."""
  if size <= limit:
    return size
  tiles = -(-size // limit)
  return 8 * -(-size // (8 * tiles))


def centering(embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Origin and unit for the scores.

  The origin is the mean of a sample of the codes, each coordinate rounded to a
  power of two near its spread: a codebook around zero keeps its origin, and
  integers stay integers, so that exact ties stay exact. The unit is 1 unless
  the largest coordinate is outside 2^-20 ... 2^30.

  Returns:
    shift [D] and scale [], a power of two.
  """
  peaks = jnp.max(jnp.abs(embedding), axis=1)  # [K]: no copy of the codebook
  peak = jnp.max(jnp.where(jnp.isfinite(peaks), peaks, 0))
  sample = embedding[:: -(-embedding.shape[0] // _SAMPLE)]
  sample = jnp.where(jnp.isfinite(sample), sample, 0)
  share = 1 / sample.shape[0]  # first: a sum of codes may overflow
  mean = jnp.sum(sample * share, axis=0)
  spread = jnp.sum(jnp.abs(sample - mean[None]) * share, axis=0)
  spread = jnp.maximum(spread, jnp.abs(mean) * 2.0**-20)
  grid = jnp.ldexp(jnp.float32(1), jnp.minimum(jnp.frexp(spread)[1], 126))
  top = jnp.frexp(peak)[1]  # the power of two just above
  scale = jnp.ldexp(jnp.float32(1), jnp.clip(top, -20, 30) - top)
  return jnp.round(mean / grid) * grid, scale


def _center_codes(codes, shift, scale):
  """Centered codes; NaN and Inf become 0."""
  centered = (codes - shift[None]) * scale
  return jnp.where(jnp.isfinite(centered), centered, 0)


def _center_rows(e, shift, scale):
  """Centered rows; NaN and Inf become 0.

  If a row is 2^25 times longer than every code, only its direction decides; it
  is shortened (to 2^55) so that its scores stay finite.
  """
  centered = e - shift[None]
  centered = jnp.where(jnp.isfinite(centered), centered, 0)
  top = jnp.frexp(jnp.max(jnp.abs(centered), axis=1, keepdims=True))[1]
  return centered * jnp.minimum(scale, jnp.ldexp(jnp.float32(1), 55 - top))


def _bias(embedding, shift, scale):
  """-|c|^2 / 2 of the centered codes [K]; -inf if it is not finite."""
  squares = jnp.sum(((embedding - shift[None]) * scale) ** 2, axis=1)
  return jnp.where(jnp.isfinite(squares), -0.5 * squares, -jnp.inf)


def _best(x, embedding, bias, shift, scale, codes, backend):
  """Best code of each centered row, and its lead; a running maximum over tiles.

  The last tile starts early enough to be full, so nothing is padded; its codes
  that the previous tile scored are masked. Scores are [codes, rows]:
  maxima over the leading axis vectorise over rows. XLA:CPU does not vectorise
  argmax, so there the id is the lowest that attains the maximum; elsewhere both
  come from one pass over the scores.
  """
  k = embedding.shape[0]
  lanes = jnp.arange(codes, dtype=jnp.int32)

  def visit(i, best):
    first = jnp.minimum(i * codes, k - codes)
    tile = jax.lax.dynamic_slice_in_dim(embedding, first, codes)
    offset = jax.lax.dynamic_slice_in_dim(bias, first, codes)
    offset = jnp.where(lanes >= i * codes - first, offset, -jnp.inf)
    score = jax.lax.dot_general(
      _center_codes(tile, shift, scale),
      x,
      (((1,), (1,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST,  # GPUs would multiply in TF32
      preferred_element_type=jnp.float32,
    )
    score = score + offset[:, None]
    top = jnp.max(score, axis=0)
    if backend == 'cpu':
      lane = jnp.where(score == top[None], lanes[:, None], codes - 1)
      lane = jnp.min(lane, axis=0)
    else:
      lane = jax.lax.argmax(score, 0, jnp.int32)
    # XLA removes the second best if the caller uses only ids.
    rest = jnp.where(lanes[:, None] == lane[None], -jnp.inf, score)
    rest = jnp.maximum(jnp.max(rest, axis=0), jnp.minimum(top, best[0]))
    better = top > best[0]
    return (
      jnp.where(better, top, best[0]),
      jnp.where(better, first + lane, best[1]),
      jnp.maximum(rest, best[2]),
    )

  zeros = x[:, 0] * 0  # made of x: shard_map then lets it vary as x does
  start = (zeros - jnp.inf, zeros.astype(jnp.int32), zeros - jnp.inf)
  top, ids, second = jax.lax.fori_loop(0, -(-k // codes), visit, start)
  return ids, top - second


def _over_blocks(search, e, rows):
  """search(block) for blocks of `rows` rows of e, one after another.

  Block b holds the rows b, b + B, b + 2 B ...: the loop then never runs over
  the sharded axis, and each device searches its own rows of every block.
  Consecutive rows would make the partitioner gather e.
  """
  n, dim = e.shape
  blocks = -(-n // rows)
  if blocks == 1:
    return search(e)
  padded = jnp.pad(e, ((0, rows * blocks - n), (0, 0)))
  strided = padded.reshape(rows, blocks, dim)

  def visit(_, b):
    return None, search(jax.lax.dynamic_index_in_dim(strided, b, 1, False))

  _, found = jax.lax.scan(visit, None, jnp.arange(blocks, dtype=jnp.int32))
  return jax.tree.map(lambda x: x.T.reshape(-1)[:n], found)
