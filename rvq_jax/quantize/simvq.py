"""`SimVQ`, a baseline: one linear map moves all codes together."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import (
  HIGHEST,
  Dense,
  NearestQuantizer,
  QuantizerOutput,
  direction_metrics,
)
from rvq_jax.quantize.codebook import draw_codes
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.gradients import ESTIMATORS


class SimVQ(NearestQuantizer):
  """Nearest of K codes that one learned linear map moves together.

  Zhu et al. 2024 (arXiv:2411.02038). The codes are C W. C [K, D] is Gaussian
  with standard deviation D^-1/2, drawn by `init` and never written again
  (variable `embedding` of the collection 'codebook'). W [D, D] is learned
  (parameter `map/kernel`, no bias) and starts as the identity. The gradient of
  any chosen code changes W and with it every code, so no code falls behind. The
  loss is commitment_weight MSE(e, sg(q)) + codebook_weight MSE(sg(e), q).

  Each call computes C W, K D^2 multiplications, in evaluation too. `train` only
  omits ambiguous_share. `metrics` are as in `VectorQuantizer`, without
  dead_codes and replaced_codes.

  Attributes: as in `VectorQuantizer`; codebook_weight trains W.
  """

  estimator: str = field('ste', choices=ESTIMATORS)

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z [..., C]; see `VectorQuantizer.__call__`."""
    e, mask = self.inputs(z, mask)
    e = self.project_in(e, self.code_dim or z.shape[-1])
    dim = e.shape[1]
    frozen = self.variable(
      'codebook',
      'embedding',
      lambda: draw_codes(self.make_rng('params'), (self.codebook_size, dim)),
    )
    eye = lambda _, shape, dtype: jnp.eye(shape[0], dtype=dtype)  # noqa: E731
    linear = Dense(dim, use_bias=False, kernel_init=eye, name='map')
    codes = linear(jax.lax.stop_gradient(frozen.value))
    ids, ambiguous = self.nearest(e, codes, mask, train)
    q = jnp.take(codes, ids, axis=0)
    quantized = self.estimate(e, q, ids, mask)
    loss, metrics = self.loss(e, q, mask, self.codebook_weight)
    counts = self.count(ids, e, mask)
    metrics |= diversity(counts) | direction_metrics(e, q, mask) | ambiguous
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics)

  def codes(self) -> jax.Array:
    """The codes C W [K, D] of bound variables."""
    kernel: jax.Array = self.get_variable('params', 'map')['kernel']
    codes: jax.Array = self.get_variable('codebook', 'embedding')
    return jnp.dot(codes, kernel, precision=HIGHEST)
