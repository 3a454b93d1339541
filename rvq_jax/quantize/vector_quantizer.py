"""`VectorQuantizer`: the linen layer that owns the collection 'codebook'."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize import codebook as cb
from rvq_jax.quantize import losses, sharded
from rvq_jax.quantize.base import (
  QuantizerOutput,
  count,
  finish,
  prepare,
  project_out,
)
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.movement import (
  DEFERRED,
  Deferred,
  Movement,
  defers,
  unit,
)
from rvq_jax.quantize.search import nearest_codes


class VectorQuantizer(nn.Module):
  """Replaces each input vector by the nearest of K codes (paper 3.2, 3.4).

  Everything inside is float32, whatever the dtype of the input. The value of
  `quantized` is the codes to the bit for every estimator.

  With `ema=True` the codes live in the collection 'codebook' (`embedding`
  [K, D], `cluster_size` [K], `embedding_sum` [K, D]) and move by
  `codebook.ema_update`; call with `train=True` and `mutable=['codebook']`. With
  `ema=False` the codes are the parameter `embedding`, trained by the codebook
  loss. Evaluation (`train=False`) and `init` write nothing.

  Codes whose `cluster_size` falls under `dead_code_threshold` times the mean
  count N/K move next to codes that are used too much, whose clusters they then
  share (`replacement.replace_codes`). The draw uses the rng stream
  'codebook' where one is given (the same key on every device), else a key
  derived from the codebook itself.

  `metrics` holds: quantization_error (mean squared, per number),
  commitment_loss, codebook_loss, usage and perplexity (of this batch alone: N
  vectors cannot use more than N codes), dead_codes (share of codes under the
  threshold), replaced_codes (number), mean_angle (degrees between e and q),
  fallback_share (vectors without a rotation), encoder_norm and code_norm (mean
  |e| and |q|).

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
  >>> codes = layer.apply(updates, out.ids, method='codes_from_ids')
  >>> codes.shape
  (2, 4, 4, 8)

  Attributes:
    codebook_size: K, number of codes.
    code_dim: D, numbers in a code. Where it differs from the input's channels
      a linear projection leads in and another out. None: the input's channels.
    estimator: 'rotation', 'reflection' (eq. 4) or 'ste' (eq. 7).
    ema: codes move by moving average rather than by gradient.
    decay: alpha of the moving average (eq. 6), in [0, 1].
    eps: Laplace smoothing of the cluster sizes.
    commitment_weight: weight of MSE(e, sg(q)), which moves the encoder.
    codebook_weight: weight of MSE(sg(e), q), which moves the codes; used only
      when ema is False.
    loss_form: 'two_weights' as above; 'paper_eq5' MSE(q, e) + beta
      MSE(q, sg(e)); 'paper_eq8' beta/2 |e - sg(q)|^2 summed over D, with beta
      = commitment_weight.
    cosine: inputs and codes are scaled to unit norm first.
    dead_code_threshold: fraction of the mean count N/K; 0 never replaces.
    split_fraction: how far from the code that it joins a dead code is put
      towards one of that code's vectors; 1 is onto the vector.
    init_from: 'data': the first training batch fills the codebook; until then
      cluster_size is 0. 'normal': Gaussian codes of norm about 1 that expect
      the count N/K of the batch given to `init`. Without ema always 'normal'.
    max_scale: upper bound of |q|/|e| in the gradient.
    freeze: the codes stay as they are, in training too; the encoder and the
      decoder learn around them.
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
    mesh: a mesh with the axes 'data' and 'codes' whose size divides K: under
      `jit` the codebook is split over 'codes'; see `sharded`. None: every
      device holds all codes.
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
  split_fraction: float = 0.2
  init_from: str = 'data'
  max_scale: float = 10.0
  freeze: bool = False
  axis_name: Any = None
  mesh: Any = None

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> QuantizerOutput:
    """Quantizes z.

    Args:
      z: inputs [..., C], float.
      train: move the codebook (writes the collection 'codebook').
      mask: positions that count [...], bool. The others are quantized too, but
        stay out of counts, losses, metrics and the codebook.

    Returns:
      `QuantizerOutput`.

    Raises:
      ValueError: an argument is out of range, z is not a float array, or the
        mask does not fit.
    """
    if self.mesh is not None and not self.ema:
      raise ValueError(
        'VectorQuantizer: expected ema=True with a mesh: learned codes are not '
        'split over devices'
      )
    e, rows = prepare(self, z, mask)
    dim = self.code_dim or z.shape[-1]
    project = dim != z.shape[-1]
    if project:
      e = nn.Dense(dim, name='project_in')(e)
    if self.cosine:
      e = unit(e)

    book, write = self._codebook(dim, e.shape[0])
    movement = self._movement()
    moving = train and self.ema and not self.freeze
    moving = moving and not self.is_initializing()
    fill_key = None
    if moving and self.init_from == 'data':
      fill_key = jax.random.fold_in(self._key(book), 1)
      if not defers(self):
        book = movement.fill(book, fill_key, e, rows)
    if movement.mesh is None:
      ids = nearest_codes(e, book.embedding)
      q = jnp.take(book.embedding, ids, axis=0)
    else:
      ids, q = sharded.find(movement.mesh, e, book.embedding)
    quantized = ESTIMATORS[self.estimator](e, q, self.max_scale)
    learned = not self.ema and not self.freeze
    loss, metrics = losses.quantizer_loss(
      e,
      q if learned else jax.lax.stop_gradient(q),
      rows,
      form=self.loss_form,
      commitment_weight=self.commitment_weight,
      codebook_weight=self.codebook_weight if learned else 0.0,
    )
    counts = count(self, ids, e, rows)
    metrics |= losses.health(e, q, rows, counts)
    if self.ema:
      expected = movement.expected_size(e, rows, self.codebook_size)
      dead = movement.dead(book, expected)
      metrics['dead_codes'] = jnp.mean(dead.astype(jnp.float32))
    if moving:
      key = self._key(book)
      if defers(self):
        vectors = jax.lax.stop_gradient(e)
        later = Deferred(movement, fill_key, key, vectors, ids, rows)
        self.sow(DEFERRED, 'moves', later)
      else:
        book, moved = movement.move(book, key, e, ids, rows)
        metrics |= moved
        write(book)
    return finish(
      z,
      quantized,
      ids,
      loss=loss,
      counts=counts,
      metrics=metrics,
      project=project,
    )

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids stand for: `quantized` of the forward.

    Args:
      ids: code indices [...], int, each in [0, K).

    Returns:
      [..., C], float32.
    """
    source = 'codebook' if self.ema else 'params'
    embedding = self.get_variable(source, 'embedding')
    if not self.ema and self.cosine:
      embedding = unit(embedding)
    return project_out(self, jnp.take(embedding, ids, axis=0))

  def _codebook(self, dim, batch):
    """The codebook, and how to write it back. Declares its variables."""
    size = self.codebook_size

    def draw(key, shape):
      codes = jax.random.normal(key, shape, jnp.float32) * shape[1] ** -0.5
      return unit(codes) if self.cosine else codes

    if not self.ema:
      embedding = self.param('embedding', draw, (size, dim))
      if self.cosine:
        embedding = unit(embedding)
      empty = jnp.zeros(size, jnp.float32)
      return cb.Codebook(embedding, empty, empty[:, None]), None
    variable = self.variable(
      'codebook',
      'embedding',
      lambda: draw(self.make_rng('params'), (size, dim)),
    )
    expected = 0.0 if self.init_from == 'data' else batch / size
    start = lambda: cb.Codebook.create(variable.value, expected)  # noqa: E731
    variables = cb.Codebook(
      variable,
      self.variable('codebook', 'cluster_size', lambda: start().cluster_size),
      self.variable('codebook', 'embedding_sum', lambda: start().embedding_sum),
    )

    def write(book):
      variables.embedding.value = book.embedding
      variables.cluster_size.value = book.cluster_size
      variables.embedding_sum.value = book.embedding_sum

    return cb.Codebook(*(v.value for v in _fields(variables))), write

  def _key(self, book):
    if self.has_rng('codebook'):
      return self.make_rng('codebook')
    bits = jax.lax.bitcast_convert_type(jnp.sum(book.embedding_sum), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), bits)

  def _movement(self):
    return Movement(
      decay=self.decay,
      eps=self.eps,
      cosine=self.cosine,
      dead_code_threshold=self.dead_code_threshold,
      split_fraction=self.split_fraction,
      axis_name=None if self.is_initializing() else self.axis_name,
      mesh=None if self.is_initializing() else self.mesh,
    )


def _fields(book):
  return book.embedding, book.cluster_size, book.embedding_sum
