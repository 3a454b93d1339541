"""`VectorQuantizer`: the linen layer that assigns each vector a code."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import (
  LOSS_FORMS,
  NearestQuantizer,
  QuantizerOutput,
  direction_metrics,
)
from rvq_jax.quantize.codebook import (
  Axis,
  Codebook,
  draw_codes,
  ema_update,
  row_weights,
  unit,
)
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.replacement import fill_codebook, replace_codes


class VectorQuantizer(NearestQuantizer):
  """Replaces each input vector by the nearest of K codes (paper 3.2, 3.4).

  Everything inside is float32. `quantized` is the codes, bit-exact.

  With `ema=True` the codes live in the collection 'codebook' (`embedding`
  [K, D], `cluster_size` [K], `embedding_sum` [K, D]), which `ema_update` moves.
  With `ema=False` they are the parameter `embedding`, trained by the loss, plus
  `offset` [K, D] of the collection, which moves when codes are filled or
  replaced. Training needs `train=True` and `mutable=['codebook']`; evaluation
  and `init` write nothing.

  Codes whose `cluster_size` falls under `dead_code_threshold` times the mean
  count N/K split the clusters of others (`replacement.replace_codes`). The draw
  uses the rng stream 'codebook' if given (the same key on every device), else a
  key derived from the codebook.

  `metrics` holds: quantization_error (mean squared, per dimension),
  commitment_loss, codebook_loss, usage and perplexity (of this batch only),
  dead_codes (share of codes under the threshold), replaced_codes (how many),
  mean_angle (degrees between e and q), fallback_share (of vectors without a
  rotation), encoder_norm and code_norm (mean |e| and |q|); out of training
  ambiguous_share (of vectors with two codes too close for `search` to tell).

  >>> import jax
  >>> from rvq_jax import VectorQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
  >>> layer = VectorQuantizer(codebook_size=16)
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out, updates = layer.apply(
  ...   variables, z, train=True, mutable=['codebook']
  ... )
  >>> out.quantized.shape, out.ids.shape
  ((2, 4, 4, 8), (2, 4, 4))
  >>> updates['codebook']['embedding'].shape
  (16, 8)
  >>> layer.apply(updates, out.ids, method='codes_from_ids').shape
  (2, 4, 4, 8)

  Attributes:
    codebook_size: K, number of codes.
    code_dim: D, dimensions of a code. If it differs from the input's channels,
      linear projections lead in and out. None: the channels.
    estimator: 'rotation', 'rotation_unscaled', 'reflection' (eq. 4), 'ste' (eq.
      7), 'dynamic_ste' or 'diveq'; see `gradients`. 'diveq' is for learned
      codes with both loss weights 0.
    ema: update the codes by moving average rather than by gradient.
    decay: alpha of the moving average (eq. 6), in [0, 1].
    eps: Laplace smoothing of the cluster sizes.
    commitment_weight: weight of MSE(e, sg(q)), which trains the encoder.
    codebook_weight: weight of MSE(sg(e), q), which trains the codes; used only
      when ema is False.
    loss_form: 'two_weights' as above; 'paper_eq5' MSE(q, e) + beta
      MSE(q, sg(e)); 'paper_eq8' beta/2 |e - sg(q)|^2 summed over D, with beta
      = commitment_weight.
    cosine: scale inputs and codes to unit norm first.
    inner_product: take the code with the largest inner product, not the nearest
      (IBQ, Emu3.5); training needs `freeze`.
    dead_code_threshold: fraction of the mean count N/K; 0 never replaces.
    split_by: dead codes split the clusters with the most vectors ('count') or
      the most squared error ('distortion').
    split_fraction: where a dead code goes, on the way from the code of the
      cluster to one of its vectors; 1: onto the vector.
    init_from: 'data': the first training batch fills the codebook; until then
      cluster_size is 0. 'normal': Gaussian codes of norm about 1 that expect
      the count N/K of the batch given to `init`.
    max_scale: upper bound of |q|/|e| in the gradient.
    freeze: training does not move the codes, but still fills an empty codebook
      (`init_from='data'`).
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
  """

  ema: bool = field(True)
  decay: float = field(0.99, 0, 1)
  eps: float = field(1e-5, 1e-30, 1)
  loss_form: str = field('two_weights', choices=LOSS_FORMS)
  cosine: bool = field(False)
  inner_product: bool = field(False)
  dead_code_threshold: float = field(0.9, 0)
  split_by: str = field('count', choices=('count', 'distortion'))
  split_fraction: float = field(0.2, 1e-30, 1)
  init_from: str = field('data', choices=('data', 'normal'))
  freeze: bool = field(False)

  sums_codes = False  # True: several codes add up to a vector

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z.

    Args:
      z: inputs [..., C], float.
      train: update the codebook.
      mask: valid positions [...], bool. The others are quantized too, but do
        not enter counts, losses, metrics or the codebook.

    Raises:
      ValueError: an argument, z or the mask is not as described.
    """
    e, mask = self.inputs(z, mask)
    e = self.normed(self.project_in(e, self.code_dim or z.shape[-1]))
    book = self._begin(train, lambda: (e, mask), e.shape)
    ids, ambiguous = self.nearest(e, book.embedding, mask, train)
    q = jnp.take(book.embedding, ids, axis=0)
    quantized = self.estimate(e, q, ids, mask)
    weight = 0.0 if self.ema or self.freeze else self.codebook_weight
    loss, metrics = self.loss(e, q, mask, weight)
    counts = self.count(ids, e, mask)
    metrics |= diversity(counts) | direction_metrics(e, q, mask) | ambiguous
    metrics |= self._end(train, book, e, ids, mask)
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics)

  def check(self) -> None:
    """As in `NearestQuantizer`; sums of codes refuse some options."""
    name = type(self).__name__
    if self.sums_codes and self.cosine:
      raise ValueError(
        f'{name}: expected cosine=False: unit vectors lose the length of a '
        'residual'
      )
    if self.sums_codes and self.estimator in ('dynamic_ste', 'diveq'):
      raise ValueError(
        f'{name}: expected an estimator for several codes, got '
        f'{self.estimator!r}'
      )
    super().check()

  def trains_codes(self) -> bool:
    """As in `NearestQuantizer`; also by moving average or another loss form."""
    form = self.loss_form != 'two_weights'
    return self.ema or form or super().trains_codes()

  def codes(self) -> jax.Array:
    """The codes [K, D] of bound variables."""
    if self.ema:
      return self.get_variable('codebook', 'embedding')
    offset: jax.Array = self.get_variable('codebook', 'offset')
    return self.normed(self.get_variable('params', 'embedding') + offset)

  def normed(self, x: jax.Array) -> jax.Array:
    """x [..., D], scaled to unit norm if cosine is set."""
    return unit(x) if self.cosine else x

  def _begin(self, train, first, shape):
    """Declares the codebook of vectors [N, D] = shape; fills it if it is empty.

    Its embedding has a gradient only if the loss trains the codes. `first`
    returns vectors and weights to fill from, as `_end` takes them.
    """
    book = self._declare(*shape)
    if self._phase(train)[0]:
      e, weight = first()
      book = fill_codebook(
        book,
        jax.random.fold_in(self._key(book), 1),
        e,
        expected_size=self._expected_count(e, weight),
        axis_name=self.axis_name,
        mask=weight,
      )
    if not (self.ema or self.freeze):
      return book
    return book.replace(embedding=jax.lax.stop_gradient(book.embedding))

  def _end(self, train, book, e, ids, weight):
    """Moves and replaces the codes of a training call; stores the codebook.

    Vectors e [N, D] chose ids [N]; weight [N] is a mask or their weights.
    Returns the metrics dead_codes and, after an update, replaced_codes.
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
    if self.freeze:  # the collection of filled codes may be immutable
      return fills and self.is_mutable_collection('codebook'), False
    return fills, trains

  def _declare(self, batch, dim):
    """Declares the variables; returns the codebook."""
    size = self.codebook_size
    expected = 0.0 if self.init_from == 'data' else batch / size
    draw = lambda key: self.normed(draw_codes(key, (size, dim)))  # noqa: E731
    if self.ema:
      declare = functools.partial(self.variable, 'codebook')
      codes = declare('embedding', lambda: draw(self.make_rng('params'))).value
      start = Codebook.create(codes, expected)
      count = declare('cluster_size', lambda: start.cluster_size).value
      sums = declare('embedding_sum', lambda: start.embedding_sum).value
      return Codebook(codes, count, sums)
    self.param('embedding', draw)
    self.variable('codebook', 'offset', jnp.zeros, (size, dim))
    # With a weak dtype the second step would compile again.
    full = jnp.full, (size,), expected, jnp.float32
    count = self.variable('codebook', 'cluster_size', *full).value
    codes = self.codes()
    return Codebook(codes, count, count[:, None] * jax.lax.stop_gradient(codes))

  def _store(self, book):
    """Writes the codebook; the offset moves learned codes."""
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
    """Key of a draw, the same on every device."""
    if self.has_rng('codebook'):
      return self.make_rng('codebook')
    bits = jax.lax.bitcast_convert_type(jnp.sum(book.embedding_sum), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), bits)

  def _expected_count(self, e, mask):
    """N/K, the count that a code expects; N is the global sum of weights."""
    total = jnp.sum(row_weights(e, mask))
    return Axis(self.mapped_axis).psum(total) / self.codebook_size

  def _dead(self, book, expected):
    """The codes under the threshold, bool [K]."""
    return book.cluster_size < self.dead_code_threshold * expected

  def _update(self, book, e, ids, mask, expected):
    """Moves and splits the codebook; also counts the replaced codes."""
    key, axis = self._key(book), self.axis_name
    if self.ema:
      book = ema_update(
        book, e, ids, decay=self.decay, eps=self.eps, axis_name=axis, mask=mask
      )
      book = self._on_sphere(book)
    else:
      size = self.decay * book.cluster_size
      size += (1 - self.decay) * self.count(ids, e, mask)
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
