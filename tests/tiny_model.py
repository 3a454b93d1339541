"""The model that most tests share: a second to compile."""

import inspect

from rvq_jax import VQVAE
from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.registry import make_quantizer

SIZES = {'widths': (4,), 'factor': 4, 'num_res_blocks': 0, 'code_dim': 4}


def tiny_vqvae(vq=None, *, num_heads=2, freeze_encoder=False, **shared):
  """A `VQVAE` of 4 channels; `shared` are fields of encoder and decoder.

  vq is a quantizer, or its arguments with its name; its axis_name is theirs.
  """
  shared = SIZES | shared
  if vq is None or isinstance(vq, dict):
    axis = shared.get('axis_name')
    vq = make_quantizer(**{'codebook_size': 16, 'axis_name': axis} | (vq or {}))
  fields = inspect.signature(Decoder).parameters
  mirrored = {n: value for n, value in shared.items() if n in fields}
  return VQVAE(
    encoder=Encoder(**shared),
    vq=vq,
    decoder=Decoder(num_heads=num_heads, **mirrored),
    freeze_encoder=freeze_encoder,
  )
