"""`ProductQuantizer`: several codes per position, one for each piece."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize import base
from rvq_jax.quantize.vector_quantizer import VectorQuantizer


class ProductQuantizer(VectorQuantizer):
  """Cuts each vector into `heads` pieces with a code each (Jegou et al. 2011).

  ids are [..., heads]; counts [heads, K]. Loss and metrics are means over the
  heads. K codes per head are K^heads codes per position, at the cost of
  searching heads x K.

  >>> import jax
  >>> from rvq_jax import ProductQuantizer
  >>> z = jax.random.normal(jax.random.key(0), (64, 8))
  >>> layer = ProductQuantizer(codebook_size=16, heads=2)
  >>> variables = layer.init(jax.random.key(1), z)
  >>> out = layer.apply(variables, z)
  >>> out.quantized.shape, out.ids.shape, out.counts.shape
  ((64, 8), (64, 2), (2, 16))
  >>> variables['codebook']['head_0']['embedding'].shape  # of half a vector
  (16, 4)

  Attributes:
    heads: pieces, and codes per position.
    codebook_size: K, codes per head.
    code_dim: D, dimensions of a piece. Where heads x D differs from the input's
      channels C a linear projection leads in and another out. None: C / heads.
      All other attributes are those of `VectorQuantizer`.
  """

  heads: int = 2

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> base.QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    e, mask = base.flatten(self, z, mask)
    channels, heads = z.shape[-1], self.heads
    if self.code_dim is None and channels % heads:
      raise ValueError(
        f'ProductQuantizer: expected channels that {heads} heads divide, got '
        f'{channels}; or give code_dim'
      )
    dim = self.code_dim or channels // heads
    pieces = base.project_in(e, heads * dim).reshape(-1, heads, dim)
    parts = base.make_parts(self, VectorQuantizer, 'head', heads, dim)
    outputs = [
      part(pieces[:, h], train=train, mask=mask) for h, part in enumerate(parts)
    ]
    quantized = jnp.concatenate([out.quantized for out in outputs], axis=-1)
    return base.finish(z, quantized, **base.combine(outputs))

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The quantized vectors that ids stand for: `quantized` of the forward.

    Args:
      ids: code indices [..., heads], int, each in [0, K).

    Returns:
      [..., C], float32.

    Raises:
      ValueError: the last axis of ids is not the heads.
    """
    if ids.ndim < 1 or ids.shape[-1] != self.heads:
      raise ValueError(
        f'expected ids [..., {self.heads}], one code per head, got {ids.shape}'
      )
    pieces = [
      jnp.take(base.embedding(self, f'head_{h}'), ids[..., h], axis=0)
      for h in range(self.heads)
    ]
    return base.project_out(self, jnp.concatenate(pieces, axis=-1))
