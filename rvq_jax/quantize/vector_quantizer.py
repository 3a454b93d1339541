"""`VectorQuantizer`: the linen layer that gives each vector a code."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import QuantizerOutput
from rvq_jax.quantize.codebook_quantizer import CodebookQuantizer
from rvq_jax.quantize.losses import direction_metrics
from rvq_jax.quantize.search import nearest_codes


class VectorQuantizer(CodebookQuantizer):
  """Replaces each input vector by the nearest of K codes (paper 3.2, 3.4).

  Everything inside is float32, whatever the dtype of the input. `quantized` is
  the codes, bit-exact, for every estimator.

  With `ema=True` the codes live in the collection 'codebook' (`embedding`
  [K, D], `cluster_size` [K], `embedding_sum` [K, D]) and are updated by
  `codebook.ema_update`. With `ema=False` they are the parameter `embedding`,
  trained by the loss, plus `offset` [K, D] of the collection, which moves when
  codes are filled or replaced. Call with `train=True` and
  `mutable=['codebook']`. Evaluation (`train=False`) and `init` write nothing.

  Codes whose `cluster_size` falls under `dead_code_threshold` times the mean
  count N/K move next to codes that are used too much and share their clusters
  (`replacement.replace_codes`). The draw uses the rng stream 'codebook' if
  given (the same key on every device), else a key derived from the codebook.

  `metrics` holds: quantization_error (mean squared, per dimension),
  commitment_loss, codebook_loss, usage and perplexity (of this batch only: N
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
    split_fraction: how far a dead code is put from the code that it joins
      towards one of its vectors; 1 is onto the vector.
    init_from: 'data': the first training batch fills the codebook; until then
      cluster_size is 0. 'normal': Gaussian codes of norm about 1 that expect
      the count N/K of the batch given to `init`.
    max_scale: upper bound of |q|/|e| in the gradient.
    freeze: training does not move the codes either, but fills an empty codebook
      (`init_from='data'`).
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
  """

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z.

    Args:
      z: inputs [..., C], float.
      train: update the codebook (writes the collection 'codebook').
      mask: valid positions [...], bool. The others are quantized too, but stay
        out of counts, losses, metrics and the codebook.

    Raises:
      ValueError: an argument is out of range, z is not a float array, or the
        mask does not fit.
    """
    e, mask = self.inputs(z, mask)
    e = self.normed(self.project_in(e, self.code_dim or z.shape[-1]))
    book = self._begin(train, lambda: (e, mask), e.shape)
    ids = nearest_codes(e, book.embedding)
    q = jnp.take(book.embedding, ids, axis=0)
    quantized = self.estimate(e, q, ids, mask)
    weight = 0.0 if self.ema or self.freeze else self.codebook_weight
    loss, metrics = self.loss(
      e, q, mask, form=self.loss_form, codebook_weight=weight
    )
    counts = self.count(ids, e, mask)
    metrics |= diversity(counts) | direction_metrics(e, q, mask)
    metrics |= self._end(train, book, e, ids, mask)
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics)


class PartsQuantizer(CodebookQuantizer):
  """Several `VectorQuantizer`s that share the arguments of one."""

  def parts(self, number: int) -> list[VectorQuantizer]:
    """`number` quantizers of the channels that they are given."""
    names = {field.name for field in dataclasses.fields(VectorQuantizer)}
    names -= {'code_dim', 'parent', 'name'}
    shared = {name: getattr(self, name) for name in names}
    return [VectorQuantizer(**shared) for _ in range(number)]

  def combine(
    self, z: jax.Array, outputs: list[QuantizerOutput]
  ) -> dict[str, Any]:
    """ids [..., L], counts [L, K], and mean loss and metrics of L parts."""
    ids = jnp.stack([out.ids for out in outputs], axis=-1)
    number = len(outputs)
    return {
      'ids': ids.reshape(*z.shape[:-1], number),
      'loss': sum(out.loss for out in outputs) / number,
      'counts': jnp.stack([out.counts for out in outputs]),
      'metrics': {
        name: sum(out.metrics[name] for out in outputs) / number
        for name in outputs[0].metrics
      },
    }
