"""`ResidualQuantizer`: several codes per position, coarse to fine."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize import base
from rvq_jax.quantize.losses import direction_metrics
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

LEAST_RESIDUAL = 1e-5
"""Share of |e| under which a residual trains no further level."""


class ResidualQuantizer(VectorQuantizer):
  """Quantizes what the codes so far leave over, `depth` times (RQ-VAE).

  With r_0 = e: q_d is the code nearest to r_d, and r_(d+1) = r_d - q_d. The
  quantized vector is q_0 + q_1 + ...; a prefix of the codes is a coarser one.
  The estimator is applied once, from e to the whole sum: the sum of one
  estimate per level, which other implementations take, multiplies the gradient
  by the depth. The loss is the mean over the levels of MSE(e, sg(q_0 + ... +
  q_d)) and, for learned codes, of the codebook losses (Lee et al., CVPR 2022,
  eq. 7). In training, a vector that lies on its codes up to rounding
  (`LEAST_RESIDUAL`) is not valid for the levels after them: with K at least the
  number of vectors each step with `init_from='data'` fills one more level.

  ids are [..., depth], coarsest first; counts [depth, K]. `metrics` holds the
  means over the levels, except for quantization_error, mean_angle,
  fallback_share, encoder_norm and code_norm, which are those of the whole sum,
  and `quantization_error_D`, the error that the first D codes leave.

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
    codebook_size: K, codes per level. All other attributes are those of
      `VectorQuantizer`; cosine, dynamic_ste and diveq are not possible here.
  """

  depth: int = 4

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> base.QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    check_residual(self)
    e, mask = base.flatten(self, z, mask)
    dim = self.code_dim or z.shape[-1]
    e = base.project_in(e, dim)

    outputs, total, left, valid = [], None, e, mask
    for level in base.make_parts(
      self, VectorQuantizer, 'level', self.depth, dim
    ):
      if train and total is not None:
        # What rounding leaves of a vector on its code must not fill a level.
        length = jnp.linalg.norm(e, axis=1)
        valid &= jnp.linalg.norm(left, axis=1) > LEAST_RESIDUAL * length
      out = level(left, train=train, mask=valid)
      q = jax.lax.stop_gradient(out.quantized)
      total = q if total is None else total + q
      left = e - total
      outputs.append(out)
    quantized = base.estimate(self, e, total, outputs[0].ids, mask)

    rest = base.combine(outputs)
    rest['metrics'] |= direction_metrics(e, total, mask)
    for d, out in enumerate(outputs, 1):
      error = out.metrics['quantization_error']
      rest['metrics'][f'quantization_error_{d}'] = error
    rest['metrics']['quantization_error'] = error
    return base.finish(z, quantized, **rest)

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids, or a prefix of their codes, stand for.

    Args:
      ids: code indices [..., d], int, each in [0, K), with d from 1 to depth.

    Returns:
      [..., C], float32: `quantized` of the forward pass when d is the depth.

    Raises:
      ValueError: d is out of range.
    """
    depth = ids.shape[-1] if ids.ndim else 0
    if not 1 <= depth <= self.depth:
      raise ValueError(
        f'expected ids [..., d] with d from 1 to {self.depth} codes per '
        f'position, got {ids.shape}'
      )
    levels = [
      jnp.take(base.embedding(self, f'level_{d}'), ids[..., d], axis=0)
      for d in range(depth)
    ]
    return base.project_out(self, sum(levels[1:], levels[0]))


def check_residual(module: nn.Module) -> None:
  """Raises ValueError where a quantizer of residuals is asked the impossible.

  Args:
    module: the quantizer, with the attributes of `VectorQuantizer`.
  """
  name = type(module).__name__
  if module.cosine:
    raise ValueError(
      f'{name}: expected cosine=False: a unit vector loses the length of a '
      'residual'
    )
  if module.estimator in ('dynamic_ste', 'diveq'):
    raise ValueError(
      f'{name}: expected an estimator for several codes, got '
      f'{module.estimator!r}'
    )
