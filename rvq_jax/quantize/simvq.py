"""`SimVQ`, a baseline: one linear map moves all codes together."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize import base, losses
from rvq_jax.quantize.codebook import draw_codes
from rvq_jax.quantize.search import nearest_codes


class SimVQ(nn.Module):
  """Nearest of K codes that one learned linear map moves together.

  Zhu et al. 2024 (arXiv:2411.02038). The codes are C W: C [K, D] is Gaussian of
  standard deviation D^-1/2, drawn by `init` and never written again (variable
  `embedding` of the collection 'codebook'); W [D, D] is learned (parameter
  `map/kernel`, no bias) and starts as the identity. The gradient of any chosen
  code changes W and with it every code, so none is left behind. The loss is
  commitment_weight MSE(e, sg(q)) + codebook_weight MSE(sg(e), q).

  C W is computed anew in each call, K D^2 multiplications, in evaluation too.
  `train` changes nothing. `metrics` are those of `VectorQuantizer` other than
  dead_codes and replaced_codes.

  Attributes:
    codebook_size: K, number of codes.
    code_dim: D, dimensions of a code. Where it differs from the input's
      channels a linear projection leads in and another out. None: the channels.
    commitment_weight: weight of MSE(e, sg(q)), which trains the encoder.
    codebook_weight: weight of MSE(sg(e), q), which trains W.
    estimator: as of `VectorQuantizer`.
    max_scale: upper bound of |q|/|e| in the gradient.
    axis_name: mapped axis or axes of `pmap` or `shard_map`, to sum over.
  """

  codebook_size: int
  code_dim: int | None = None
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0
  estimator: str = 'ste'
  max_scale: float = 10.0
  axis_name: Any = None

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> base.QuantizerOutput:
    """Quantizes z [..., C]; see `VectorQuantizer.__call__`."""
    del train
    e, mask = base.flatten(self, z, mask)
    dim = self.code_dim or z.shape[-1]
    e = base.project_in(e, dim)
    frozen = self.variable(
      'codebook',
      'embedding',
      lambda: draw_codes(self.make_rng('params'), (self.codebook_size, dim)),
    )
    eye = lambda _, shape, dtype: jnp.eye(*shape, dtype=dtype)  # noqa: E731
    linear = nn.Dense(dim, use_bias=False, kernel_init=eye, name='map')
    codes = linear(jax.lax.stop_gradient(frozen.value))
    ids = nearest_codes(e, codes)
    q = jnp.take(codes, ids, axis=0)
    quantized = base.estimate(self, e, q, ids, mask)
    loss, metrics = losses.quantizer_loss(
      e,
      q,
      mask,
      form='two_weights',
      commitment_weight=self.commitment_weight,
      codebook_weight=self.codebook_weight,
      axis_name=base.mapped_axis(self),
    )
    counts = base.count(self, ids, e, mask)
    metrics |= diversity(counts) | losses.direction_metrics(e, q, mask)
    return base.finish(z, quantized, ids, loss, counts, metrics)

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 that ids [...] in [0, K) stand for."""
    kernel = self.get_variable('params', 'map')['kernel']
    codes = self.get_variable('codebook', 'embedding') @ kernel
    return base.project_out(self, jnp.take(codes, ids, axis=0))
