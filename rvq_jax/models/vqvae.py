"""The whole VQ-VAE: encoder, quantizer, decoder."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.base import QuantizerOutput
from rvq_jax.quantize.registry import make_quantizer


@flax.struct.dataclass
class VQVAEOutput:
  """What the forward pass returns.

  Attributes:
    reconstruction: images [B, h, w, 3], float32 in [-1, 1].
    quantizer: the quantizer's output; its ids are [B, H, W], or [B, H, W, L]
      with L codes per position.
    latents: z [B, H, W, D] before quantization.
  """

  reconstruction: jax.Array
  quantizer: QuantizerOutput
  latents: jax.Array


class VQVAE(nn.Module):
  """Images to a grid of integers and back (paper figure 1).

  Collections: params, batch_stats, codebook.

  >>> import jax
  >>> from rvq_jax import VQVAE
  >>> model = VQVAE(
  ...   widths=(4, 8),
  ...   factor=4,
  ...   num_res_blocks=0,
  ...   num_heads=2,
  ...   code_dim=4,
  ...   quantizer={'codebook_size': 16},
  ... )
  >>> images = jax.numpy.zeros((2, 16, 16, 3))  # in [-1, 1]
  >>> variables = jax.jit(model.init)(jax.random.key(0), images)
  >>> out = jax.jit(model.apply)(variables, images)
  >>> out.reconstruction.shape, out.quantizer.ids.shape
  ((2, 16, 16, 3), (2, 4, 4))

  Attributes:
    widths: channels of the encoder's convolutions.
    factor: image side over latent side, a power of two from 2 to 64.
    num_res_blocks: residual blocks in the encoder and in the decoder.
    num_heads: attention heads of the decoder.
    code_dim: D, channels of the latents.
    quantizer: arguments of the quantizer other than code_dim and axis_name;
      'name' says which (`registry.QUANTIZERS`), `VectorQuantizer` if left out.
    dtype: compute dtype of encoder and decoder, float32 or bfloat16.
    axis_name: mapped axis of `pmap` or `shard_map`.
    remat: see `layers.residual_blocks`.
    norm: 'batch' or 'group'; see `layers.Norm`.
    activation: 'leaky_relu' or 'swish'.
    freeze_encoder: the encoder gets no gradient, and its BatchNorm uses the
      stored statistics in training too.
  """

  widths: tuple[int, ...] = (64, 128, 256)
  factor: int = 8
  num_res_blocks: int = 6
  num_heads: int = 8
  code_dim: int = 256
  quantizer: Any = flax.core.FrozenDict(codebook_size=16384)
  dtype: Any = jnp.float32
  axis_name: Any = None
  remat: bool = False
  norm: str = 'batch'
  activation: str = 'leaky_relu'
  freeze_encoder: bool = False

  def __post_init__(self):
    """Makes the module hashable, so that `jax.jit` takes it as static."""
    self.quantizer = flax.core.freeze(self.quantizer)
    super().__post_init__()

  def setup(self):
    """Declares the three parts."""
    shared = {
      'widths': tuple(self.widths),
      'factor': self.factor,
      'num_res_blocks': self.num_res_blocks,
      'dtype': self.dtype,
      'axis_name': self.axis_name,
      'remat': self.remat,
      'norm': self.norm,
      'activation': self.activation,
    }
    self.encoder = Encoder(code_dim=self.code_dim, **shared)
    self.vq = make_quantizer(axis_name=self.axis_name, **self.quantizer)
    self.decoder = Decoder(num_heads=self.num_heads, **shared)

  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> VQVAEOutput:
    """Reconstructs images.

    Args:
      images: [B, h, w, 3], float in [-1, 1]; factor divides h and w.
      train: update batch statistics and codebook (collections 'batch_stats'
        and 'codebook' must be mutable).
      mask: valid images [B], bool; the others stay out of the quantizer's
        counts, losses and metrics.

    Raises:
      ValueError: the images have another shape.
    """
    z = self.latents(images, train=train)
    if mask is not None:
      mask = jnp.broadcast_to(mask[:, None, None], z.shape[:-1])
    out = self.vq(z, train=train, mask=mask)
    return VQVAEOutput(self.decoder(out.quantized, train=train), out, z)

  def autoencode(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Reconstructions [B, h, w, 3] of images without quantization."""
    return self.decoder(self.latents(images, train=train), train=train)

  def latents(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Encoder outputs z [B, H, W, D] before quantization."""
    shape = images.shape
    if len(shape) != 4 or shape[-1] != 3:
      raise ValueError(f'expected images [B, h, w, 3], got {shape}')
    if shape[1] % self.factor or shape[2] % self.factor or 0 in shape:
      raise ValueError(
        f'expected images whose sides are multiples of {self.factor}, got '
        f'{shape[1]}x{shape[2]}; crop or pad them'
      )
    if self.freeze_encoder:
      return jax.lax.stop_gradient(self.encoder(images))
    return self.encoder(images, train=train)

  def encode(self, images: jax.Array) -> jax.Array:
    """Token ids [B, H, W(, L)] int32 of images [B, h, w, 3] in [-1, 1]."""
    return self.vq(self.latents(images)).ids

  def decode(self, ids: jax.Array) -> jax.Array:
    """Images [B, h, w, 3] in [-1, 1] of token ids [B, H, W(, L)]."""
    return self.decoder(self.vq.codes_from_ids(ids))
