"""The model that most tests share: a second to compile."""

import functools

import flax.linen as nn
import jax

from rvq_jax import VQVAE
from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.registry import make_quantizer

SIZES = {'widths': (4,), 'factor': 4, 'num_res_blocks': 0}


def tiny_vqvae(
  vq=None, *, code_dim=4, num_heads=2, freeze_encoder=False, **shared
):
  """A `VQVAE` of 4 channels; `shared` are fields of encoder and decoder.

  vq is a quantizer, or its arguments with its name; its axis_name is theirs.
  """
  shared = SIZES | shared
  if vq is None or isinstance(vq, dict):
    axis = shared.get('axis_name')
    vq = make_quantizer(**{'codebook_size': 16, 'axis_name': axis} | (vq or {}))
  return VQVAE(
    encoder=Encoder(code_dim=code_dim, **shared),
    vq=vq,
    decoder=Decoder(num_heads=num_heads, **shared),
    freeze_encoder=freeze_encoder,
  )


@functools.partial(
  jax.jit,
  static_argnames=('module', 'train'),
  compiler_options={'xla_backend_optimization_level': 1},
)
def init(module, x, **train):
  """A module's variables for inputs x, compiled in a third of the time."""
  return module.init(jax.random.key(0), x, **train)


def layer_dtypes(*calls):
  """Path of each layer that the calls enter -> dtype of its result."""
  dtypes = {}

  def record(call, arguments, keywords, context):
    y = call(*arguments, **keywords)
    if context.module.path and context.method_name == '__call__':
      dtypes[context.module.path] = y.dtype
    return y

  with nn.intercept_methods(record):
    for call in calls:
      call()
  return dtypes
