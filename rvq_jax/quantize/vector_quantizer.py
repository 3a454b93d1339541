"""`VectorQuantizer`: the linen layer that owns the collection 'codebook'."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize import base, losses
from rvq_jax.quantize.codebook import (
  Codebook,
  draw_codes,
  ema_update,
  expected_count,
  row_weights,
  unit,
)
from rvq_jax.quantize.replacement import fill_codebook, replace_codes
from rvq_jax.quantize.search import nearest_codes


class VectorQuantizer(nn.Module):
  """Replaces each input vector by the nearest of K codes (paper 3.2, 3.4).

  Everything inside is float32, whatever the dtype of the input. The value of
  `quantized` is the codes, bit-exact, for every estimator.

  With `ema=True` the codes live in the collection 'codebook' (`embedding`
  [K, D], `cluster_size` [K], `embedding_sum` [K, D]) and are updated by
  `codebook.ema_update`. With `ema=False` they are the parameter `embedding`,
  trained by the loss, plus `offset` [K, D] of the collection, which moves when
  codes are filled or replaced. Call with `train=True` and
  `mutable=['codebook']`. Evaluation (`train=False`) and `init` write nothing.

  Codes whose `cluster_size` falls under `dead_code_threshold` times the mean
  count N/K move next to codes that are used too much, whose clusters they then
  share (`replacement.replace_codes`). The draw uses the rng stream 'codebook'
  if given (the same key on every device), else a key derived from the codebook.

  `metrics` holds: quantization_error (mean squared, per dimension),
  commitment_loss, codebook_loss, usage and perplexity (of this batch alone: N
  vectors cannot use more than N codes), dead_codes (share of codes under the
  threshold), replaced_codes (how many), mean_angle (degrees between e and q),
  fallback_share (of vectors without a rotation), encoder_norm and code_norm
  (mean |e| and |q|).

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
    code_dim: D, dimensions of a code. Where it differs from the input's
      channels a linear projection leads in and another out. None: the channels.
    estimator: 'rotation', 'rotation_unscaled', 'reflection' (eq. 4), 'ste' (eq.
      7), 'dynamic_ste' or 'diveq'; see `gradients` and `estimators`. 'diveq' is
      for learned codes with both loss weights 0.
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
    dead_code_threshold: fraction of the mean count N/K; 0 never replaces.
    split_by: dead codes join the codes with the most vectors ('count') or the
      most squared error ('distortion'); see `replacement.replace_codes`.
    split_fraction: a dead code is put this fraction of the way from the code
      that it joins to one of that code's vectors; 1 is onto the vector.
    init_from: 'data': the first training batch fills the codebook; until then
      cluster_size is 0. 'normal': Gaussian codes of norm about 1 that expect
      the count N/K of the batch given to `init`.
    max_scale: upper bound of |q|/|e| in the gradient.
    freeze: codes stay as they are in training too; an empty codebook is filled
      first (`init_from='data'`).
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
  """

  codebook_size: int
  code_dim: int | None = None
  estimator: str = 'rotation'
  ema: bool = True
  decay: float = 0.99
  eps: float = 1e-5
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0
  loss_form: str = 'two_weights'
  cosine: bool = False
  dead_code_threshold: float = 0.9
  split_by: str = 'count'
  split_fraction: float = 0.2
  init_from: str = 'data'
  max_scale: float = 10.0
  freeze: bool = False
  axis_name: Any = None

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> base.QuantizerOutput:
    """Quantizes z.

    Args:
      z: inputs [..., C], float.
      train: update the codebook (writes the collection 'codebook').
      mask: valid positions [...], bool. The others are quantized too, but stay
        out of counts, losses, metrics and the codebook.

    Returns:
      `QuantizerOutput`.

    Raises:
      ValueError: an argument is out of range, z is not a float array, or the
        mask does not fit.
    """
    e, mask = base.flatten(self, z, mask)
    e = base.project_in(e, self.code_dim or z.shape[-1])
    if self.cosine:
      e = unit(e)
    update = train and not self.is_initializing()
    # Frozen codes are filled too, and may lie in a collection that is not
    # mutable once they are.
    fill = update and self.init_from == 'data'
    if self.freeze:
      fill = fill and self.is_mutable_collection('codebook')
      update = False

    book, write = self._codebook(batch=len(e), dim=e.shape[1])
    expected = self._expected_count(e, mask)
    if fill:
      book = self._fill(book, e, mask, expected)
    ids = nearest_codes(e, book.embedding)
    q = jnp.take(book.embedding, ids, axis=0)
    if self.ema or self.freeze:
      q = jax.lax.stop_gradient(q)
    quantized = base.estimate(self, e, q, ids, mask)
    loss, metrics = self._loss(e, q, mask)
    counts = base.count(self, ids, e, mask)
    metrics |= diversity(counts) | losses.direction_metrics(e, q, mask)
    dead = self._dead(book, expected)
    metrics['dead_codes'] = jnp.mean(dead.astype(jnp.float32))
    if update:
      book, replaced = self._update(book, e, ids, mask, expected)
      metrics['replaced_codes'] = replaced.astype(jnp.float32)
    if update or fill:
      write(book)
    return base.finish(z, quantized, ids, loss, counts, metrics)

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids stand for: `quantized` of the forward.

    Args:
      ids: code indices [...], int, each in [0, K).

    Returns:
      [..., C], float32.
    """
    return base.project_out(self, jnp.take(base.embedding(self), ids, axis=0))

  def _codebook(
    self, batch: int, dim: int
  ) -> tuple[Codebook, Callable[[Codebook], None]]:
    """Declares the variables; the codebook, and the function to store it."""
    size = self.codebook_size

    def draw(key):
      codes = draw_codes(key, (size, dim))
      return unit(codes) if self.cosine else codes

    expected = 0.0 if self.init_from == 'data' else batch / size
    if not self.ema:
      return self._learned_codebook(draw, expected, dim)

    embedding = self.variable(
      'codebook', 'embedding', lambda: draw(self.make_rng('params'))
    )

    def start(name):
      return getattr(Codebook.create(embedding.value, expected), name)

    variables = {'embedding': embedding}
    for name in ('cluster_size', 'embedding_sum'):
      variables[name] = self.variable('codebook', name, start, name)

    def write(book):
      for name, variable in variables.items():
        variable.value = getattr(book, name)

    return Codebook(**{n: v.value for n, v in variables.items()}), write

  def _learned_codebook(self, draw, expected, dim):
    """As `_codebook`, of a parameter and an offset."""
    shape = (self.codebook_size, dim)
    learned = self.param('embedding', draw)
    offset = self.variable('codebook', 'offset', jnp.zeros, shape)
    # Of a dtype: a weak one would have the second step compiled anew.
    full = jnp.full, shape[:1], expected, jnp.float32
    count = self.variable('codebook', 'cluster_size', *full)
    embedding = learned + offset.value
    if self.cosine:
      embedding = unit(embedding)
    fixed = jax.lax.stop_gradient(embedding)
    book = Codebook(embedding, count.value, count.value[:, None] * fixed)

    def write(new):
      count.value = new.cluster_size
      new = jax.lax.stop_gradient(new.embedding)
      moved = jnp.any(new != fixed, axis=-1, keepdims=True)
      start = jax.lax.stop_gradient(learned)
      offset.value = jnp.where(moved, new - start, offset.value)

    return book, write

  def _key(self, book):
    """Key of a random draw, the same on every device."""
    if self.has_rng('codebook'):
      return self.make_rng('codebook')
    bits = jax.lax.bitcast_convert_type(jnp.sum(book.embedding_sum), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), bits)

  def _expected_count(self, e, mask):
    """N/K: the vectors per step that a code expects."""
    return expected_count(
      row_weights(e, mask), self.codebook_size, axis_name=base.mapped_axis(self)
    )

  def _dead(self, book, expected):
    """Codes under the threshold, bool [K]."""
    return book.cluster_size < self.dead_code_threshold * expected

  def _fill(self, book, e, mask, expected):
    """The codebook before its first search, filled from the batch if empty."""
    return fill_codebook(
      book,
      jax.random.fold_in(self._key(book), 1),
      e,
      expected_size=expected,
      axis_name=self.axis_name,
      mask=mask,
    )

  def _loss(self, e, q, mask):
    """The loss and its metrics."""
    return losses.quantizer_loss(
      e,
      q,
      mask,
      form=self.loss_form,
      commitment_weight=self.commitment_weight,
      codebook_weight=0.0 if self.ema or self.freeze else self.codebook_weight,
      axis_name=base.mapped_axis(self),
    )

  def _update(self, book, e, ids, mask, expected):
    """Moving average, then replacement; the codebook and how many replaced."""
    key, axis = self._key(book), self.axis_name
    if self.ema:
      book = ema_update(
        book, e, ids, decay=self.decay, eps=self.eps, axis_name=axis, mask=mask
      )
      book = self._on_sphere(book)
    else:
      counts = base.count(self, ids, e, mask)
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
    """The codebook with codes of unit norm if cosine is set."""
    return book.replace(embedding=unit(book.embedding)) if self.cosine else book
