"""Gradient accumulation: the update of a large batch at a small one's memory.

A batch of B images is passed through the model as S microbatches of B/S, one
after another. What the update needs is put together again:

- gradients, losses and metrics are averaged, counts of codes are summed;
- the codebook moves once, as of the whole batch: every microbatch is searched
  with the same codes, and the vectors e of all of them (N x D float32, what a
  batch costs beyond a microbatch) go into one moving average and one
  replacement of dead codes. Counts and sums would not do for the replacement,
  which draws vectors by the sizes of the clusters after the average;
- the first batch fills the codebook before anything is searched, so that batch
  is encoded once more to have all its vectors at hand.

BatchNorm alone differs: a microbatch is normalised by its own statistics. The
running ones take one step, towards the mean of the microbatches'.

Microbatch s holds the images s, s + S, s + 2S ..., so that where the batch is
sharded by rows each device works on its own rows of every microbatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from rvq_jax.quantize.codebook import Codebook
from rvq_jax.quantize.losses import diversity
from rvq_jax.quantize.movement import DEFERRED, Deferred

_FIELDS = ('embedding', 'cluster_size', 'embedding_sum')


class Pass(NamedTuple):
  """A forward and backward pass over a batch.

  Attributes:
    loss: float32 scalar of the global batch.
    grads: of `loss` with respect to the parameters.
    metrics: float32 scalars over this device's batch.
    counts: of the codes in the global batch, [K] or [L, K].
    updates: the collections that the pass wrote.
  """

  loss: jax.Array
  grads: Any
  metrics: dict[str, jax.Array]
  counts: jax.Array
  updates: dict[str, Any]


def accumulate(
  run: Callable[..., Pass],
  params,
  variables: dict[str, Any],
  images: jax.Array,
  key: jax.Array,
  *,
  steps: int,
) -> Pass:
  """The pass of a whole batch, made of passes of its microbatches.

  Args:
    run: (params, variables, images, key, mutable) -> `Pass` of a microbatch.
    params: to differentiate by.
    variables: the collections batch_stats and codebook.
    images: the batch [B, h, w, 3]; this device's share under an axis name.
    key: random key of the quantizer.
    steps: S, microbatches; it divides B.

  Returns:
    The `Pass` of the batch.
  """
  size = images.shape[0] // steps
  strided = images.reshape((size, steps) + images.shape[1:])
  mutable = ('batch_stats', 'codebook', DEFERRED)

  def visit(variables, s):
    # The first one draws what the whole batch would draw.
    own = jnp.where(s == 0, key, jax.random.fold_in(key, s))
    part = jax.lax.dynamic_index_in_dim(strided, s, 1, keepdims=False)
    return run(params, variables, part, own, mutable)

  def vectors(variables):
    """Path -> the `Deferred` of the whole batch, without gradients."""
    _, stacked = jax.lax.scan(
      lambda _, s: (None, _moves(visit(variables, s).updates)),
      None,
      jnp.arange(steps),
    )
    return {path: _joined(d, size) for path, d in stacked.items()}

  def visit_and_add(grads, s):
    part = visit(variables, s)
    grads = jax.tree.map(jnp.add, grads, part.grads)
    updates = dict(part.updates)
    moves = _moves(updates)
    updates.pop(DEFERRED, None)
    return grads, (part._replace(grads=None, updates=updates), moves)

  variables = variables | {
    'codebook': _filled(variables['codebook'], vectors, variables)
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, (parts, moves) = jax.lax.scan(visit_and_add, zeros, jnp.arange(steps))
  metrics = jax.tree.map(_mean, parts.metrics)
  counts = jnp.sum(parts.counts, axis=0)
  metrics |= _diversity(counts)
  updates = dict(parts.updates)
  if 'batch_stats' in updates:
    updates['batch_stats'] = jax.tree.map(_mean, updates['batch_stats'])
  if 'codebook' in updates:
    # Each microbatch started from the same codebook; any of them will do.
    codebook = jax.tree.map(lambda x: x[0], updates['codebook'])
    moves = {path: _joined(d, size) for path, d in moves.items()}
    updates['codebook'], moved = _moved(codebook, moves)
    metrics |= moved
  return Pass(
    _mean(parts.loss),
    jax.tree.map(lambda g: g / steps, grads),
    metrics,
    counts,
    updates,
  )


def _mean(x):
  return jnp.mean(x, axis=0)


def _diversity(counts):
  """usage and perplexity of counts [K], or their means over L codebooks."""
  each = jax.vmap(diversity)(counts.reshape(-1, counts.shape[-1]))
  return jax.tree.map(_mean, each)


def _moves(updates) -> dict[tuple, Deferred]:
  """Path of a codebook -> its `Deferred`."""
  flat = traverse_util.flatten_dict(updates.get(DEFERRED, {}))
  for path, moves in flat.items():
    if len(moves) != 1:
      raise ValueError(
        f'accumulation: expected the codebook {"/".join(path[:-1])} to be '
        f'searched once a step, got {len(moves)} times (shared=True)'
      )
  return {path[:-1]: moves[0] for path, moves in flat.items()}


def _joined(stacked: Deferred, size: int) -> Deferred:
  """The whole batch's, rows in order, of the microbatches' [S, ...]."""

  def join(x):
    steps, n = x.shape[:2]
    x = x.reshape((steps, size, n // size) + x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape((steps * n,) + x.shape[3:])

  first = jax.tree.map(lambda x: x[0], stacked)
  return first.replace(
    e=join(stacked.e), ids=join(stacked.ids), rows=join(stacked.rows)
  )


def _book(flat, path) -> Codebook:
  return Codebook(*(flat[path + (name,)] for name in _FIELDS))


def _put(flat, path, book):
  return flat | {path + (name,): getattr(book, name) for name in _FIELDS}


def _filled(codebook, vectors, variables):
  """The codebook before its first search; see `Movement.fill`.

  A codebook that quantizes what another leaves over is filled after it.
  """
  template = jax.eval_shape(vectors, variables)
  paths = [p for p, d in template.items() if d.fill_key is not None]
  if not paths:
    return codebook
  flat = traverse_util.flatten_dict(codebook)

  def fill(flat):
    for path in paths:
      tree = traverse_util.unflatten_dict(flat)
      d = vectors(variables | {'codebook': tree})[path]
      book = d.movement.fill(_book(flat, path), d.fill_key, d.e, d.rows)
      flat = _put(flat, path, book)
    return flat

  sizes = [jnp.sum(flat[path + ('cluster_size',)]) for path in paths]
  untouched = jnp.any(jnp.stack(sizes) == 0)
  flat = jax.lax.cond(untouched, fill, lambda flat: flat, flat)
  return traverse_util.unflatten_dict(flat)


def _moved(codebook, moves):
  """The codebook after the step, and the metrics of its movement."""
  flat, metrics = traverse_util.flatten_dict(codebook), []
  for path, d in moves.items():
    book = _book(flat, path)
    expected = d.movement.expected_size(d.e, d.rows, len(book.cluster_size))
    dead = jnp.mean(d.movement.dead(book, expected).astype(jnp.float32))
    book, moved = d.movement.move(book, d.key, d.e, d.ids, d.rows)
    metrics.append({'dead_codes': dead} | moved)
    flat = _put(flat, path, book)
  if metrics:
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
    metrics = jax.tree.map(_mean, stacked)
  return traverse_util.unflatten_dict(flat), dict(metrics)
