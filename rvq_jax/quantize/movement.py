"""How a codebook moves in training: filled once, averaged, dead codes replaced.

`VectorQuantizer` moves its codebook in each call. A caller that accumulates
gradients moves it once for several calls instead: it makes the collection
`DEFERRED` mutable, by name, and each call then leaves the codebook alone and
sows a `Deferred`, whose vectors the caller joins (`training/accumulate.py`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.quantize import codebook as cb
from rvq_jax.quantize import replacement, sharded

DEFERRED = 'deferred'


def unit(x):
  """x/|x| along the last axis [..., D]; 0 stays 0, also in the gradient."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  safe = jnp.where(square > 0, square, 1.0)
  return jnp.where(square > 0, x * jax.lax.rsqrt(safe), 0.0)


@dataclasses.dataclass(frozen=True)
class Movement:
  """The rule of movement; the attributes are those of `VectorQuantizer`."""

  decay: float
  eps: float
  cosine: bool
  dead_code_threshold: float
  split_fraction: float
  axis_name: Any = None
  mesh: Any = None

  def _function(self, function):
    """The function for a codebook that lies where ours does."""
    if self.mesh is None:
      return functools.partial(function, axis_name=self.axis_name)
    return functools.partial(getattr(sharded, function.__name__), self.mesh)

  def expected_size(self, e, rows, codebook_size: int) -> jax.Array:
    """N / K of the global batch: the vectors that a code expects a step."""
    total = jnp.sum(cb.valid_rows(e, rows).astype(jnp.float32))
    if self.axis_name is not None:
      total = jax.lax.psum(total, self.axis_name)
    return total / codebook_size

  def dead(self, book: cb.Codebook, expected: jax.Array) -> jax.Array:
    """Codes under the threshold, bool [K]."""
    return book.cluster_size < self.dead_code_threshold * expected

  def fill(self, book, key, e, rows) -> cb.Codebook:
    """Puts codes onto vectors, unless the codebook has been filled.

    Those that get no vector stay dead.

    Args:
      book: the codebook.
      key: random key, the same on every device.
      e: vectors [N, D]; this device's share when axis_name is given.
      rows: rows that count [N], bool.

    Returns:
      The codebook before its first search.
    """

    def fill(book):
      return self._function(replacement.fill_codebook)(
        book,
        key,
        e,
        expected_size=self.expected_size(e, rows, len(book.cluster_size)),
        mask=rows,
      )

    untouched = jnp.sum(book.cluster_size) == 0
    return jax.lax.cond(untouched, fill, lambda book: book, book)

  def move(
    self, book, key, e, ids, rows
  ) -> tuple[cb.Codebook, dict[str, jax.Array]]:
    """One step: the moving average, then the replacement of dead codes.

    Args:
      book: the codebook that was searched.
      key: random key, the same on every device.
      e: vectors [N, D]; this device's share when axis_name is given.
      ids: their codes [N].
      rows: rows that count [N], bool.

    Returns:
      The codebook after the step, and `replaced_codes`.
    """
    expected = self.expected_size(e, rows, len(book.cluster_size))
    book = self._function(cb.ema_update)(
      book, e, ids, decay=self.decay, eps=self.eps, mask=rows
    )
    if self.cosine:
      book = book.replace(embedding=unit(book.embedding))
    replaced = jnp.zeros((), jnp.int32)
    if self.dead_code_threshold:
      book, replaced = self._function(replacement.replace_codes)(
        book,
        self.dead(book, expected),
        key,
        e,
        ids,
        expected_size=expected,
        step=self.split_fraction,
        mask=rows,
      )
    return book, {'replaced_codes': replaced.astype(jnp.float32)}


@flax.struct.dataclass
class Deferred:
  """A call's part in a movement of the codebook that the caller makes.

  Attributes:
    movement: the rule.
    fill_key: random key of `Movement.fill`; None: the codebook is not filled.
    key: random key of `Movement.move`.
    e: the call's vectors [N, D].
    ids: their codes [N].
    rows: rows that count [N], bool.
  """

  movement: Movement = flax.struct.field(pytree_node=False)
  fill_key: jax.Array | None
  key: jax.Array
  e: jax.Array
  ids: jax.Array
  rows: jax.Array


def defers(module: nn.Module) -> bool:
  """Whether the caller asked for `DEFERRED` by name; mutable=True does not."""
  return module.is_mutable_collection(
    DEFERRED
  ) and not module.is_mutable_collection('params')
