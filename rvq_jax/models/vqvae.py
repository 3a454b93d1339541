"""The whole VQ-VAE: encoder, quantizer, decoder."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.base import QuantizerOutput, check_mask
from rvq_jax.quantize.vector_quantizer import VectorQuantizer


@flax.struct.dataclass
class VQVAEOutput:
  """The output of the forward pass.

  Attributes:
    reconstruction: images [B, h, w, 3], float32 in [-1, 1].
    quantizer: its ids are [B, H, W], or [B, H, W, L] with L codes per position;
      None with quantize=False.
    latents: z [B, H, W, D] before quantization.
  """

  reconstruction: jax.Array
  quantizer: QuantizerOutput | None
  latents: jax.Array


class VQVAE(nn.Module):
  """Images to a grid of integers and back (paper figure 1).

  Collections: params, batch_stats, codebook.

  >>> import jax
  >>> from rvq_jax import VQVAE, VectorQuantizer
  >>> from rvq_jax.models.decoder import Decoder
  >>> from rvq_jax.models.encoder import Encoder
  >>> sizes = {'widths': (4, 8), 'factor': 4, 'num_res_blocks': 0}
  >>> model = VQVAE(
  ...   encoder=Encoder(code_dim=4, **sizes),
  ...   vq=VectorQuantizer(codebook_size=16),
  ...   decoder=Decoder(num_heads=2, **sizes),
  ... )
  >>> images = jax.numpy.zeros((2, 16, 16, 3))  # in [-1, 1]
  >>> variables = jax.jit(model.init)(jax.random.key(0), images)
  >>> out = jax.jit(model.apply)(variables, images)
  >>> out.reconstruction.shape, out.quantizer.ids.shape
  ((2, 16, 16, 3), (2, 4, 4))

  Attributes:
    encoder: images to latents [B, h/factor, w/factor, D]; it has `factor`, and
      takes `train`.
    vq: a quantizer for the latents, see `rvq_jax.quantize.registry`.
    decoder: latents to images; it takes `train`.
    freeze_encoder: the encoder gets no gradient, and its BatchNorm also uses
      the stored statistics in training.
  """

  encoder: nn.Module = Encoder()
  vq: nn.Module = VectorQuantizer(codebook_size=16384)
  decoder: nn.Module = Decoder()
  freeze_encoder: bool = False

  @property
  def factor(self) -> int:
    """Image side over latent side."""
    return self.encoder.factor

  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool = False,
    mask: jax.Array | None = None,
    quantize: bool = True,
  ) -> VQVAEOutput:
    """Reconstructs images.

    Args:
      images: [B, h, w, 3], float in [-1, 1]; factor divides h and w.
      train: update the collections 'batch_stats' and 'codebook', which must be
        mutable.
      mask: [B], bool: the images in the quantizer's counts, losses and metrics.
      quantize: False: the decoder gets the latents, scaled to unit norm if the
        codes are (cosine).

    Raises:
      ValueError: the images have another shape, or a layer refuses its fields.
    """
    check_mask(mask, images.shape[:1])
    z = self.latents(images, train=train)
    if not quantize:
      x = self.vq.normed(z.astype(jnp.float32)).astype(z.dtype)
      return VQVAEOutput(self.decoder(x, train=train), None, z)
    if mask is not None:
      mask = jnp.broadcast_to(mask[:, None, None], z.shape[:-1])
    out = self.vq(z, train=train, mask=mask)
    return VQVAEOutput(self.decoder(out.quantized, train=train), out, z)

  def latents(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Encoder outputs z [B, H, W, D] before quantization."""
    shape = images.shape
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    if len(shape) != 4 or shape[-1] != 3 or not floating or not shape[0]:
      raise ValueError(
        'images: expected float [B, h, w, 3] in [-1, 1], got '
        f'{images.dtype} {shape}'
      )
    if shape[1] % self.factor or shape[2] % self.factor or 0 in shape:
      raise ValueError(
        f'images: expected sides that are multiples of {self.factor}, got '
        f'{shape[1]}x{shape[2]}; crop or pad them'
      )
    if self.freeze_encoder:
      return jax.lax.stop_gradient(self.encoder(images))
    return self.encoder(images, train=train)

  def encode(self, images: jax.Array) -> jax.Array:
    """Token ids [B, H, W(, L)] int32 of images [B, h, w, 3] in [-1, 1]."""
    return self.vq.ids(self.latents(images))

  def decode(self, ids: jax.Array) -> jax.Array:
    """Images [B, h, w, 3] in [-1, 1] of token ids [B, H, W(, L)]."""
    return self.decoder(self.vq.codes_from_ids(ids))
