"""`ProductQuantizer`: several codes per position, one per piece."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.quantize.base import QuantizerOutput
from rvq_jax.quantize.fields import field
from rvq_jax.quantize.residual import PartsQuantizer


class ProductQuantizer(PartsQuantizer):
  """Cuts each vector into `heads` pieces with a code each (Jegou et al. 2011).

  ids are [..., heads]; counts [heads, K]. Loss and metrics are means over the
  heads. Searching heads x K codes chooses among K^heads per position.

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
    code_dim: D, dimensions of a piece. If heads x D differs from the input's
      channels C, linear projections lead in and out. None: C / heads.
      For the others see `VectorQuantizer`; inner_product is not possible here.
  """

  heads: int = field(2, 1, 64)

  def setup(self):
    """Declares head_0, head_1 ..."""
    self.check()
    self.head = self.parts(self.heads)

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z; see `VectorQuantizer.__call__`."""
    e, mask = self.inputs(z, mask)
    channels, heads = z.shape[-1], self.heads
    if self.code_dim is None and channels % heads:
      raise ValueError(
        f'ProductQuantizer: expected a number of channels that {heads} heads '
        f'divide, got {channels}; or set code_dim'
      )
    dim = heads * (self.code_dim or channels // heads)
    pieces = self._pieces(self.project_in(e, dim))
    outputs = [
      head(pieces[:, h], train=train, mask=mask)
      for h, head in enumerate(self.head)
    ]
    quantized = jnp.concatenate([out.quantized for out in outputs], axis=-1)
    return self.finish(z, quantized, **self.combine(z, outputs))

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [..., heads] int32 of z [..., C], equal to the call's."""
    pieces = self._pieces(self.bound('project_in', self.rows(z)))
    ids = [head.ids(pieces[:, h]) for h, head in enumerate(self.head)]
    return jnp.stack(ids, axis=-1).reshape(*z.shape[:-1], self.heads)

  def codes_from_ids(self, ids: jax.Array) -> jax.Array:
    """The vectors [..., C] float32 of ids [..., heads] in [0, K).

    ValueError: the last axis of ids is not `heads` long.
    """
    if ids.ndim < 1 or ids.shape[-1] != self.heads:
      raise ValueError(
        f'expected ids [..., {self.heads}], one code per head, got {ids.shape}'
      )
    pieces = [
      head.codes_from_ids(ids[..., h]) for h, head in enumerate(self.head)
    ]
    return self.bound('project_out', jnp.concatenate(pieces, axis=-1))

  def normed(self, x: jax.Array) -> jax.Array:
    """x [..., heads D], each piece of unit norm if cosine is set."""
    pieces = x.reshape(*x.shape[:-1], self.heads, -1)
    return super().normed(pieces).reshape(x.shape)

  def _pieces(self, e):
    """e [N, C] cut into [N, heads, C / heads]."""
    return e.reshape(len(e), self.heads, e.shape[1] // self.heads)
