"""The decoder: attention, residual blocks, transposed convolutions (3.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.models.encoder import Coder
from rvq_jax.models.layers import SelfAttention, Upsample
from rvq_jax.quantize.fields import field


class Decoder(Coder):
  """Latents [B, H, W, code_dim] to images [B, factor H, factor W, 3].

  The mirror of `Encoder`: a 1x1 convolution, self-attention on the latent grid,
  residual blocks at the last width, then the stages backwards, each a
  transposed convolution (or a 3x3 convolution if the encoder's stage has stride
  1), and tanh.

  Attributes:
    num_heads: attention heads. For the others see `Coder`.
  """

  num_heads: int = field(8, 1, 2**31 - 1)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Decodes latents; images are float32 in [-1, 1].

    Raises:
      ValueError: a field is outside its range, or num_heads does not divide the
        last width.
    """
    stages, x = self.stages(), x.astype(self.dtype)
    x = nn.Conv(stages[-1][0], (1, 1), dtype=self.dtype, name='in')(x)
    x = SelfAttention(self.num_heads, dtype=self.dtype, name='attention')(x)
    x = self.residual_blocks(x, train)
    outputs = [3, *(width for width, _ in stages[:-1])]
    for i in reversed(range(len(stages))):
      options = {'dtype': self.dtype, 'name': f'up{i}'}
      taps = 1 / 4 if stages[i][1] == 2 else 1
      if i:
        options['kernel_init'] = self.stem_init(taps)
      if stages[i][1] == 2:
        x = Upsample(outputs[i], **options)(x)
      else:
        x = nn.Conv(outputs[i], (3, 3), **options)(x)
      if i:
        x = self.norm_and_act(x, f'norm{i}', train)
    return jnp.tanh(x.astype(jnp.float32))
