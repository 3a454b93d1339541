"""`CodebookQuantizer`: how training fills, moves and replaces codes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rvq_jax.quantize.base import NearestQuantizer
from rvq_jax.quantize.codebook import (
  Codebook,
  draw_codes,
  ema_update,
  expected_count,
  row_weights,
  unit,
)
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.losses import LOSS_FORMS
from rvq_jax.quantize.replacement import fill_codebook, replace_codes


class CodebookQuantizer(NearestQuantizer):
  """A quantizer with a codebook that training calls change.

  A call starts with `_begin`, which declares the codebook and fills it from the
  first batch, and ends with `_end`, which moves and replaces codes. For the
  fields see `VectorQuantizer`.
  """

  ema: bool = field(True)
  decay: float = field(0.99, 0, 1)
  eps: float = field(1e-5, 1e-30, 1)
  loss_form: str = field('two_weights', choices=LOSS_FORMS)
  cosine: bool = field(False)
  dead_code_threshold: float = field(0.9, 0)
  split_by: str = field('count', choices=('count', 'distortion'))
  split_fraction: float = field(0.2, 1e-30, 1)
  init_from: str = field('data', choices=('data', 'normal'))
  freeze: bool = field(False)

  sums_codes = False  # whether several codes add up to a vector

  def check(self) -> None:
    """As `NearestQuantizer`, and that codes can be summed where they are."""
    name = type(self).__name__
    if self.sums_codes and self.cosine:
      raise ValueError(
        f'{name}: expected cosine=False: a unit vector loses the length of a '
        'residual'
      )
    if self.sums_codes and self.estimator in ('dynamic_ste', 'diveq'):
      raise ValueError(
        f'{name}: expected an estimator for several codes, got '
        f'{self.estimator!r}'
      )
    super().check()

  def trains_codes(self) -> bool:
    """As `NearestQuantizer`, and by the moving average or a form of loss."""
    form = self.loss_form != 'two_weights'
    return self.ema or form or super().trains_codes()

  def codes(self) -> jax.Array:
    """The codes [K, D] of bound variables."""
    if self.ema:
      return self.get_variable('codebook', 'embedding')
    offset = self.get_variable('codebook', 'offset')
    return self.normed(self.get_variable('params', 'embedding') + offset)

  def normed(self, x: jax.Array) -> jax.Array:
    """x [..., D], of unit norm if cosine is set."""
    return unit(x) if self.cosine else x

  def _begin(
    self,
    train: bool,
    first: Callable[[], tuple[jax.Array, jax.Array]],
    shape: tuple[int, int],
  ) -> Codebook:
    """The codebook to search in, filled if it is empty.

    Its embedding has a gradient only if the loss trains the codes. `first`
    gives vectors and weights to fill from, as `_end` takes them; shape (N, D).
    """
    book = self._declare(*shape)
    fills, _ = self._phase(train)
    if fills:
      e, weight = first()
      book = fill_codebook(
        book,
        jax.random.fold_in(self._key(book), 1),
        e,
        expected_size=self._expected_count(e, weight),
        axis_name=self.axis_name,
        mask=weight,
      )
    if self.ema or self.freeze:
      fixed = jax.lax.stop_gradient(book.embedding)
      book = book.replace(embedding=fixed)
    return book

  def _end(
    self,
    train: bool,
    book: Codebook,
    e: jax.Array,
    ids: jax.Array,
    weight: jax.Array,
  ) -> dict[str, jax.Array]:
    """Moves and replaces the codes of a training call; stores the codebook.

    Vectors e [N, D] chose ids [N]; weight [N] is a mask or their weights. The
    metrics are dead_codes and, after an update, replaced_codes.
    """
    expected = self._expected_count(e, weight)
    dead = self._dead(book, expected)
    metrics = {'dead_codes': jnp.mean(dead.astype(jnp.float32))}
    fills, updates = self._phase(train)
    if updates:
      book, replaced = self._update(book, e, ids, weight, expected)
      metrics['replaced_codes'] = replaced.astype(jnp.float32)
    if fills or updates:
      self._store(book)
    return metrics

  def _phase(self, train):
    """Whether a call may fill the codebook, and whether it moves codes."""
    trains = train and not self.is_initializing()
    fills = trains and self.init_from == 'data'
    if self.freeze:
      # Once filled, frozen codes may lie in a collection that is not mutable.
      return fills and self.is_mutable_collection('codebook'), False
    return fills, trains

  def _declare(self, batch, dim):
    """Declares the variables; gives the codebook."""
    size = self.codebook_size
    expected = 0.0 if self.init_from == 'data' else batch / size

    def draw(key):
      return self.normed(draw_codes(key, (size, dim)))

    if self.ema:
      declare = functools.partial(self.variable, 'codebook')
      codes = declare('embedding', lambda: draw(self.make_rng('params'))).value
      start = Codebook.create(codes, expected)
      count = declare('cluster_size', lambda: start.cluster_size).value
      sums = declare('embedding_sum', lambda: start.embedding_sum).value
      return Codebook(codes, count, sums)
    self.param('embedding', draw)
    self.variable('codebook', 'offset', jnp.zeros, (size, dim))
    # With a dtype: a weak one would compile the second step again.
    full = jnp.full, (size,), expected, jnp.float32
    count = self.variable('codebook', 'cluster_size', *full).value
    codes = self.codes()
    return Codebook(codes, count, count[:, None] * jax.lax.stop_gradient(codes))

  def _store(self, book):
    """Writes the codebook; learned codes move by their offset."""
    values = dict(vars(book))
    if not self.ema:
      new, old = jax.lax.stop_gradient((values.pop('embedding'), self.codes()))
      moved = jnp.any(new != old, axis=-1, keepdims=True)
      start = jax.lax.stop_gradient(self.get_variable('params', 'embedding'))
      offset = self.get_variable('codebook', 'offset')
      values['offset'] = jnp.where(moved, new - start, offset)
      del values['embedding_sum']
    for name, value in values.items():
      self.put_variable('codebook', name, value)

  def _key(self, book):
    """Key of a random draw, the same on every device."""
    if self.has_rng('codebook'):
      return self.make_rng('codebook')
    bits = jax.lax.bitcast_convert_type(jnp.sum(book.embedding_sum), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), bits)

  def _expected_count(self, e, mask):
    """N/K: the vectors per step that a code expects."""
    return expected_count(
      row_weights(e, mask), self.codebook_size, axis_name=self.mapped_axis
    )

  def _dead(self, book, expected):
    """Codes under the threshold, bool [K]."""
    return book.cluster_size < self.dead_code_threshold * expected

  def _update(self, book, e, ids, mask, expected):
    """Moving average, then replacement; the codebook and how many replaced."""
    key, axis = self._key(book), self.axis_name
    if self.ema:
      book = ema_update(
        book, e, ids, decay=self.decay, eps=self.eps, axis_name=axis, mask=mask
      )
      book = self._on_sphere(book)
    else:
      counts = self.count(ids, e, mask)
      size = self.decay * book.cluster_size + (1 - self.decay) * counts
      book = book.replace(cluster_size=size)
    if not self.dead_code_threshold:
      return book, jnp.zeros((), jnp.int32)
    book, replaced = replace_codes(
      book,
      self._dead(book, expected),
      key,
      e,
      ids,
      expected_size=expected,
      split_by=self.split_by,
      split_fraction=self.split_fraction,
      axis_name=axis,
      mask=mask,
    )
    return self._on_sphere(book), replaced

  def _on_sphere(self, book):
    return book.replace(embedding=self.normed(book.embedding))
