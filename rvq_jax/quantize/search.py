"""Exact nearest-code search without an N x K array (paper eq. 3).

|e - c|^2 = |e|^2 - 2 (e.c - |c|^2 / 2), so the nearest code is the one with the
highest score e.c - |c|^2 / 2: one matmul and a running maximum over tiles.
Two things make that safe in float32 for any finite input:

- the score cancels when the codes lie far from the origin, and distances do
  not change when e and c move together, so both are first moved by the mean of
  the codebook (`frame`; a codebook around the origin is not moved at all);
- both are multiplied by a power of two where squares would leave the range of
  float32, which rounds nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('xla', 'pallas')


@functools.partial(
  jax.jit, static_argnames=('precision', 'rerank', 'implementation')
)
def nearest_codes(
  e: jax.Array,
  embedding: jax.Array,
  *,
  precision: jax.lax.PrecisionLike = None,
  rerank: int = 0,
  implementation: str | None = None,
) -> jax.Array:
  """Index of the code nearest to each row by squared distance.

  Ties go to the lowest index. A row with NaN or Inf gets some valid id; a code
  with NaN or Inf is never chosen while another is finite. Inputs are cast to
  float32; ids carry no gradient. Rows may be sharded (`NamedSharding` over the
  rows of e, embedding replicated): nothing of e is gathered.

  >>> import jax.numpy as jnp
  >>> from rvq_jax import nearest_codes
  >>> embedding = jnp.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
  >>> e = jnp.array([[0.2, 0.1], [2.5, 0.0], [0.9, 1.3]])
  >>> nearest_codes(e, embedding).tolist()
  [0, 2, 1]

  Args:
    e: vectors [N, D].
    embedding: codes [K, D].
    precision: of the matmul. None is the default of the backend: exact float32
      on CPU; on recent NVIDIA GPUs TF32, simulated to pick another, nearly as
      near code for 0.06 % of Gaussian rows at K = 16384, D = 256 and 3.7 %
      where codes crowd in tight clusters (bfloat16: 0.43 and 26 %);
      `rerank=4` mends all of these for TF32. 'highest' is float32 there.
      (`python benchmarks/quantizer.py --precision`)
    rerank: if positive, this many best candidates by score are compared again
      by sum((e - c)^2) in float32. For codes so close together, far from the
      mean of the codebook, that their scores round to the same number.
    implementation: 'xla', or 'pallas' for the fused GPU kernel of
      `search_gpu`. None is 'xla' everywhere: the kernel has not been timed on
      a GPU yet.

  Returns:
    ids [N], int32.

  Raises:
    ValueError: a shape, `rerank` or `implementation` is not as above.
  """
  _validate(e, embedding, rerank, implementation)
  n, k = e.shape[0], embedding.shape[0]
  if n == 0:
    return jnp.zeros(0, jnp.int32)
  e = jax.lax.stop_gradient(e.astype(jnp.float32))
  embedding = jax.lax.stop_gradient(embedding.astype(jnp.float32))
  shift, scale = frame(*frame_inputs(embedding))
  bias = _bias(embedding, shift, scale)
  if implementation == 'pallas':
    from rvq_jax.quantize import search_gpu

    return search_gpu.fused_argmax(
      _move_rows(e, shift, scale)[0],
      _move_codes(embedding, shift, scale),
      bias,
      precision=precision,
    )
  rows, codes = tile_sizes(n, k, jax.default_backend())

  def search_rows(block):
    x, factor = _move_rows(block, shift, scale)
    tiles = (embedding, bias, shift, scale)
    scores, ids = _best(x, tiles, codes, max(1, min(rerank, k)), precision)
    if not rerank:
      return ids[0]
    return _rerank(block, scores, ids, embedding, factor)

  return _over_blocks(search_rows, e, rows)


def tile_sizes(n: int, k: int, backend: str) -> tuple[int, int]:
  """Rows and codes scored at once: a tile of scores is rows x codes floats.

  CPU: the tile is read twice after the matmul wrote it, so it has to stay in
  the second-level cache; 512 x 1024 (2 MiB) is the fastest measured, and few
  rows take more codes to keep the matmul long. GPU and TPU: a tile is one
  kernel launch, so it has to fill the device; 16384 x 2048 is 128 MiB.

  Args:
    n: number of vectors, at least 1.
    k: number of codes, at least 1.
    backend: 'cpu', 'gpu' or 'tpu'.

  Returns:
    (rows, codes), at least 1 and at most (n, k). Evened out: a tile more than
    the limit gives two halves, not one full and one empty tile.
  """
  rows, scores = (512, 2**19) if backend == 'cpu' else (16384, 2**25)
  rows = _even(n, rows)
  return rows, _even(k, scores // min(rows, scores // 1024))


def _validate(e, embedding, rerank, implementation):
  """Raises ValueError unless the arguments of `nearest_codes` fit."""
  if e.ndim != 2 or embedding.ndim != 2 or e.shape[1] != embedding.shape[1]:
    raise ValueError(
      'nearest_codes expects e [N, D] and embedding [K, D], got '
      f'{e.shape} and {embedding.shape}.'
    )
  if embedding.shape[0] == 0:
    raise ValueError('nearest_codes expects at least one code, got K = 0.')
  if not isinstance(rerank, int) or rerank < 0:
    raise ValueError(f'rerank must be an integer of at least 0, got {rerank}.')
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'implementation must be None or one of {IMPLEMENTATIONS}, '
      f'got {implementation!r}.'
    )
  if rerank and implementation == 'pallas':
    raise ValueError(
      "implementation='pallas' keeps one candidate: use rerank=0 or 'xla'."
    )


def _even(size: int, limit: int) -> int:
  """A tile of at most about `limit` that splits `size` evenly."""
  if size <= limit:
    return size
  tiles = -(-size // limit)
  return 8 * -(-size // (8 * tiles))


def _exponent(x: jax.Array) -> jax.Array:
  """The exponent of the power of two just above |x|, elementwise, int32."""
  return jnp.frexp(x)[1]


SAMPLE = 1024


def sampled_codes(codebook_size: int) -> range:
  """Which codes `frame` looks at."""
  return range(0, codebook_size, -(-codebook_size // SAMPLE))


def frame_inputs(embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What `frame` takes: a sample of the codes, the largest coordinate [].

  Args:
    embedding: codes [K, D].
  """
  peaks = jnp.max(jnp.abs(embedding), axis=1)  # [K]: no copy of the codebook
  peak = jnp.max(jnp.where(jnp.isfinite(peaks), peaks, 0))
  return embedding[:: sampled_codes(embedding.shape[0]).step], peak


def frame(sample: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Origin and unit in which the codes are scored.

  The origin is the mean of a sample of the codes, each coordinate rounded to a
  power of two near its spread: a codebook around zero keeps the origin it has,
  and integers stay integers, so that exact ties stay exact. The unit is 1
  unless the largest coordinate is outside 2^-20 ... 2^30.

  Args:
    sample: codes [S, D].
    peak: largest finite coordinate of all codes, [].

  Returns:
    shift [D] and scale [], a power of two.
  """
  sample = jnp.where(jnp.isfinite(sample), sample, 0)
  share = 1 / sample.shape[0]  # first: a sum of codes may overflow
  mean = jnp.sum(sample * share, axis=0)
  spread = jnp.sum(jnp.abs(sample - mean[None]) * share, axis=0)
  spread = jnp.maximum(spread, jnp.abs(mean) * 2.0**-20)
  grid = jnp.ldexp(jnp.float32(1), jnp.minimum(_exponent(spread), 126))
  top = _exponent(peak)
  scale = jnp.ldexp(jnp.float32(1), jnp.clip(top, -20, 30) - top)
  return jnp.round(mean / grid) * grid, scale


def best_codes(
  e: jax.Array, embedding: jax.Array, shift: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The nearest of some of the codes, scored in the frame of all of them.

  Args:
    e: vectors [N, D], float32.
    embedding: these codes [K, D], float32.
    shift: of `frame`.
    scale: of `frame`.

  Returns:
    scores [N], which compare with those of the other codes, and ids [N].
  """
  rows, codes = tile_sizes(len(e), len(embedding), jax.default_backend())
  tiles = (embedding, _bias(embedding, shift, scale), shift, scale)

  def search_rows(block):
    x, _ = _move_rows(block, shift, scale)
    scores, ids = _best(x, tiles, codes, 1, None)
    return scores[0], ids[0]

  return _over_blocks(search_rows, e, rows)


def _move_codes(codes, shift, scale):
  """Codes in the frame; what is not finite there becomes 0."""
  moved = (codes - shift[None]) * scale
  return jnp.where(jnp.isfinite(moved), moved, 0)


def _move_rows(e, shift, scale):
  """Rows in the frame and the factor [N, 1] of each, at most `scale`.

  Only the direction of a row decides once it is 2^25 times longer than every
  code; such a row is shortened (to 2^55) so that its scores stay finite.
  """
  moved = e - shift[None]
  moved = jnp.where(jnp.isfinite(moved), moved, 0)
  top = _exponent(jnp.max(jnp.abs(moved), axis=1, keepdims=True))
  factor = jnp.minimum(scale, jnp.ldexp(jnp.float32(1), 55 - top))
  return moved * factor, factor


def _bias(embedding, shift, scale):
  """-|c|^2 / 2 in the frame [K]; -inf for a code that is not finite."""
  squares = jnp.sum(((embedding - shift[None]) * scale) ** 2, axis=1)
  return jnp.where(jnp.isfinite(squares), -0.5 * squares, -jnp.inf)


def _best(x, tiles, codes, count, precision):
  """The `count` best codes of each row, by a running maximum over tiles.

  The last tile starts early enough to be full, so nothing is padded; the codes
  it has in common with the one before are masked. Scores are [codes, rows]:
  maxima over the leading axis vectorise over rows. XLA:CPU does not vectorise
  argmax, so the index is the smallest one that attains the maximum.

  Returns:
    scores and ids [count, N], best first, equal scores by ascending id.
  """
  embedding, bias, shift, scale = tiles
  k = embedding.shape[0]
  lanes = jnp.arange(codes, dtype=jnp.int32)

  def visit(i, best):
    first = jnp.minimum(i * codes, k - codes)
    tile = jax.lax.dynamic_slice_in_dim(embedding, first, codes)
    offset = jax.lax.dynamic_slice_in_dim(bias, first, codes)
    offset = jnp.where(lanes >= i * codes - first, offset, -jnp.inf)
    score = jax.lax.dot_general(
      _move_codes(tile, shift, scale),
      x,
      (((1,), (1,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    score = score + offset[:, None]
    for j in range(count):
      top = jnp.max(score, axis=0)
      lane = jnp.where(score == top[None], lanes[:, None], codes - 1)
      lane = jnp.min(lane, axis=0)
      best = _insert(best, top, first + lane)
      if j + 1 < count:
        taken = lanes[:, None] == lane[None]
        score = jnp.where(taken, -jnp.inf, score)
    return best

  zeros = jnp.stack([x[:, 0] * 0] * count)  # from x: shard_map varies it too
  start = (zeros - jnp.inf, zeros.astype(jnp.int32))
  return jax.lax.fori_loop(0, -(-k // codes), visit, start)


def _insert(best, score, ids):
  """Puts a candidate per row into the lists; behind its equals."""
  scores, kept = list(best[0]), list(best[1])
  for j in range(len(scores)):
    better = score > scores[j]
    scores[j], score = (
      jnp.where(better, score, scores[j]),
      jnp.where(better, scores[j], score),
    )
    kept[j], ids = (
      jnp.where(better, ids, kept[j]),
      jnp.where(better, kept[j], ids),
    )
  return jnp.stack(scores), jnp.stack(kept)


def _rerank(e, scores, ids, embedding, factor):
  """The candidate with the smallest sum((e - c)^2) [N], lowest id on a tie."""
  clean = jnp.where(jnp.isfinite(e), e, 0)
  codes = jnp.take(embedding, ids, axis=0)  # [count, N, D]
  squares = jnp.sum(((clean[None] - codes) * factor[None]) ** 2, axis=-1)
  squares = jnp.where(jnp.isfinite(scores), squares, jnp.inf)
  nearest = squares == jnp.min(squares, axis=0, keepdims=True)
  return jnp.min(jnp.where(nearest, ids, embedding.shape[0] - 1), axis=0)


def _over_blocks(search: Callable, e: jax.Array, rows: int):
  """search(block) for blocks of `rows` rows of e, one after another.

  Block b holds the rows b, b + B, b + 2 B ...: the loop then runs over an axis
  that is never the sharded one, and each device works on its own rows of every
  block. Consecutive rows would make the partitioner gather e.
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
