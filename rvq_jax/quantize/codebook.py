"""The codebook: its state, its counts and the EMA update.

Pure functions of float32 arrays. With `axis_name` counts and sums span the
global batch (`pmap`, `shard_map`); under `jit` with shardings the batch is
global already and needs no name.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy.typing as npt

# The leaves of a codebook's state that count vectors: they decide no id.
COUNTS = ('cluster_size', 'embedding_sum')
# An unused code whose average size is below this stays where it is.
LEAST_SIZE = 0.01


class Axis(NamedTuple):
  """Sums and places over the mapped axis or axes `name`; none if it is None."""

  name: Any = None

  @property
  def size(self) -> int:
    """Number of shares of the batch."""
    return 1 if self.name is None else jax.lax.axis_size(self.name)

  @property
  def rank(self) -> int | jax.Array:
    """The index of this device's share."""
    return 0 if self.name is None else jax.lax.axis_index(self.name)

  def psum(self, x: jax.Array) -> jax.Array:
    """Sum of x over the shares."""
    return x if self.name is None else jax.lax.psum(x, self.name)


@flax.struct.dataclass
class Codebook:
  """K codes of D dimensions with their moving averages, all float32.

  >>> from rvq_jax import Codebook
  >>> book = Codebook.create([[0.0, 1.0], [2.0, 2.0]], cluster_size=4)
  >>> book.cluster_size.tolist(), book.embedding_sum.tolist()
  ([4.0, 4.0], [[0.0, 4.0], [8.0, 8.0]])

  Attributes:
    embedding: the codes, [K, D].
    cluster_size: moving average of the vectors per step of each code, [K].
    embedding_sum: moving average of the sum of those vectors, [K, D].
  """

  embedding: jax.Array
  cluster_size: jax.Array
  embedding_sum: jax.Array

  @classmethod
  def create(
    cls, embedding: npt.ArrayLike, cluster_size: npt.ArrayLike
  ) -> 'Codebook':
    """A codebook of codes [K, D] that expect cluster_size vectors per step.

    cluster_size is scalar or [K]; embedding_sum is cluster_size x embedding, so
    an unused code stays where it is.
    """
    embedding = jnp.asarray(embedding, jnp.float32)
    size = jnp.asarray(cluster_size, jnp.float32)
    size = jnp.broadcast_to(size, embedding.shape[:1])
    return cls(embedding, size, size[:, None] * embedding)


def unit(x: jax.Array) -> jax.Array:
  """x/|x| along the last axis [..., D]; 0 stays 0, also in the gradient."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  safe = jnp.where(square > 0, square, 1.0)
  return jnp.where(square > 0, x * jax.lax.rsqrt(safe), 0.0)


def draw_codes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Gaussian codes [K, D] of norm about 1, float32."""
  return jax.random.normal(key, shape, jnp.float32) * shape[1] ** -0.5


def row_weights(e: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """The weight of each row of e [N, D], float32 [N]: 0 where not finite.

  mask is bool [N], or weights [N], at least 0; None: all weights are 1.
  """
  finite = jnp.all(jnp.isfinite(e), axis=-1)
  weight = jnp.where(finite, 1.0 if mask is None else mask, 0)
  return weight.astype(jnp.float32)


def count_codes(
  ids: jax.Array,
  codebook_size: int,
  *,
  weight: jax.Array,
  axis_name: Any = None,
) -> jax.Array:
  """Sum of the weights [N] of each code in ids [N]; float32 [K], global."""
  counts = jnp.zeros(codebook_size, jnp.float32).at[ids].add(weight)
  return Axis(axis_name).psum(counts)


def ema_update(
  codebook: Codebook,
  e: jax.Array,
  ids: jax.Array,
  *,
  decay: float,
  eps: float = 1e-5,
  axis_name: Any = None,
  mask: jax.Array | None = None,
) -> Codebook:
  """One step of the exponential moving average (paper eq. 6, 3.4).

  With count_k the number of vectors that chose code k and sum_k their sum,

      n'_k   = decay n_k + (1 - decay) count_k
      m'_k   = decay m_k + (1 - decay) sum_k
      code_k = m'_k / ((n'_k + eps)/(sum_j n'_j + K eps) sum_j n'_j)

  The denominator is the Laplace-smoothed size. An unused code whose n'_k is 0
  or under `LEAST_SIZE` keeps its embedding: with n'_k near eps the formula
  would pull it to the origin. Rows with NaN or Inf do not count. Below, both
  vectors choose code 0:

  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from rvq_jax import Codebook, ema_update
  >>> book = Codebook.create([[0.0, 0.0], [4.0, 4.0]], cluster_size=2)
  >>> e, ids = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0, 0])
  >>> book = ema_update(book, e, ids, decay=0.9)
  >>> print(np.asarray(book.embedding).round(3))
  [[0.1 0.1]
   [4.  4. ]]
  >>> print(np.asarray(book.cluster_size).round(3))
  [2.  1.8]

  Args:
    e: vectors [N, D]; this device's share when axis_name is given.
    ids: their codes [N], int32.
    decay: alpha in [0, 1]; the paper's is 0.99.
    eps: Laplace smoothing, > 0.
    axis_name: mapped axis or axes to sum counts and vectors over.
    mask: valid rows [N], bool; None: all. Or weights [N], at least 0: a vector
      of weight 2 counts as two.
  """
  size = codebook.cluster_size.shape[0]
  e = jax.lax.stop_gradient(e).astype(jnp.float32)
  weight = row_weights(e, mask)
  counts = count_codes(ids, size, weight=weight, axis_name=axis_name)
  cluster_size = decay * codebook.cluster_size + (1 - decay) * counts
  # A scatter-add: the one-hot product is the same sum at 2 N K D operations.
  decayed = decay * codebook.embedding_sum
  weight = weight[:, None]
  share = jnp.where(weight > 0, (1 - decay) * weight * e, 0.0)
  if axis_name is None:
    embedding_sum = decayed.at[ids].add(share)  # no second [K, D] array
  else:
    sums = jnp.zeros_like(decayed).at[ids].add(share)
    embedding_sum = decayed + jax.lax.psum(sums, axis_name)
  total = jnp.sum(cluster_size)
  smoothed = (cluster_size + eps) / (total + size * eps) * total
  idle = (cluster_size == 0) | ((counts == 0) & (cluster_size < LEAST_SIZE))
  moved = embedding_sum / jnp.where(idle, 1.0, smoothed)[:, None]
  embedding = jnp.where(idle[:, None], codebook.embedding, moved)
  return Codebook(embedding, cluster_size, embedding_sum)
