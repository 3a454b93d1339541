"""`ResidualQuantizer`: several codes per position, coarse to fine."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize.base import QuantizerOutput, direction_metrics
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

LEAST_RESIDUAL = 1e-5  # share of |e|; smaller residuals train no further level


class PartsQuantizer(VectorQuantizer):
  """Several `VectorQuantizer`s that share the arguments of one."""

  several_codes = True

  def parts(self, number: int) -> list[VectorQuantizer]:
    """`number` quantizers, each of its input's channels."""
    names = {field.name for field in dataclasses.fields(VectorQuantizer)}
    names -= {'code_dim', 'parent', 'name'}
    shared = {name: getattr(self, name) for name in names}
    return [VectorQuantizer(**shared) for _ in range(number)]

  def combine(
    self, z: jax.Array, outputs: list[QuantizerOutput]
  ) -> dict[str, Any]:
    """ids [..., L], counts [L, K], and mean loss and metrics of L parts."""
    ids = jnp.stack([out.ids for out in outputs], axis=-1)
    mean = lambda *values: sum(values) / len(outputs)  # noqa: E731
    return {
      'ids': ids.reshape(*z.shape[:-1], len(outputs)),
      'loss': mean(*(out.loss for out in outputs)),
      'counts': jnp.stack([out.counts for out in outputs]),
      'metrics': jax.tree.map(mean, *(out.metrics for out in outputs)),
    }


class ResidualQuantizer(PartsQuantizer):
  """Quantizes the residual of the codes so far, `depth` times (RQ-VAE).

  With r_0 = e: q_d is the code nearest to r_d, and r_(d+1) = r_d - q_d. The
  quantized vector is q_0 + q_1 + ...; a prefix of the codes is a coarser one.
  The estimator acts once, from e to the whole sum: once per level would
  multiply the gradient by the depth. The loss is the mean over the levels of
  MSE(e, sg(q_0 + ... + q_d)) and, for learned codes, of the codebook losses
  (Lee et al., CVPR 2022, eq. 7). In training, a vector that equals the sum of
  its codes up to rounding (`LEAST_RESIDUAL`) is invalid for the next levels: if
  K is at least the number of vectors, each step fills one more level.

  ids are [..., depth], coarsest first; counts [depth, K]. `metrics` holds the
  means over the levels; for the whole sum quantization_error, mean_angle,
  fallback_share, encoder_norm and code_norm; and `quantization_error_D`, the
  error after the first D codes.

  >>> import jax
  >>> from rvq_jax import ResidualQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (64, 8))
  >>> layer = ResidualQuantizer(codebook_size=16, depth=3)
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out = layer.apply(variables, z)
  >>> out.quantized.shape, out.ids.shape, out.counts.shape
  ((64, 8), (64, 3), (3, 16))
  >>> coarse = out.ids[:, :1]  # a prefix of the codes is a coarser vector
  >>> layer.apply(variables, coarse, method='codes_from_ids').shape
  (64, 8)

  Attributes:
    depth: codes per position.
    codebook_size: K, codes per level. For the others see `VectorQuantizer`;
      cosine, inner_product, dynamic_ste and diveq are not possible here.
  """

  depth: int = field(4, 1, 64)

  sums_codes = True

  def setup(self):
    """Declares level_0, level_1 ..."""
    self.check()
    self.level = self.parts(self.depth)

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    e, mask = self.inputs(z, mask)
    e = self.project_in(e, self.code_dim or z.shape[-1])

    outputs, left, valid = [], e, mask
    total: Any = None
    for level in self.level:
      if train and total is not None:
        # Rounding errors must not fill a level.
        length = jnp.linalg.norm(e, axis=1)
        valid &= jnp.linalg.norm(left, axis=1) > LEAST_RESIDUAL * length
      out = level(left, train=train, mask=valid)
      q = jax.lax.stop_gradient(out.quantized)
      total = q if total is None else total + q
      left = e - total
      outputs.append(out)
    quantized = self.estimate(e, total, outputs[0].ids, mask)

    rest = self.combine(z, outputs)
    rest['metrics'] |= direction_metrics(e, total, mask)
    for d, out in enumerate(outputs, 1):
      error = out.metrics['quantization_error']
      rest['metrics'][f'quantization_error_{d}'] = error
    rest['metrics']['quantization_error'] = error
    return self.finish(z, quantized, **rest)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [..., depth] int32 of z [..., C], equal to the call's."""
    e = self.bound('project_in', self.rows(z))
    ids, total, left = [], None, e
    for level in self.level:
      ids.append(level.ids(left))
      q = level.codes_from_ids(ids[-1])
      total = q if total is None else total + q
      left = e - total
    return jnp.stack(ids, axis=-1).reshape(*z.shape[:-1], self.depth)

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 of ids [..., d] in [0, K).

    d from 1 to depth is a prefix of the codes; ValueError for another d.
    """
    depth = ids.shape[-1] if ids.ndim else 0
    if not 1 <= depth <= self.depth:
      raise ValueError(
        f'expected ids [..., d] with d from 1 to {self.depth} codes per '
        f'position, got {ids.shape}'
      )
    codes = [self.level[d].codes_from_ids(ids[..., d]) for d in range(depth)]
    return self.bound('project_out', sum(codes[1:], codes[0]))
