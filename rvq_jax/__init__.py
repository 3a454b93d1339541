"""Rotated Vector Quantization in JAX and Flax; R is rotation, not residual."""

from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.codebook import Codebook, ema_update
from rvq_jax.quantize.gradients import reflect, rotate, straight_through
from rvq_jax.quantize.multiple import ProductQuantizer, ResidualQuantizer
from rvq_jax.quantize.search import nearest_codes
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

__all__ = [
  'VQVAE',
  'Codebook',
  'ProductQuantizer',
  'ResidualQuantizer',
  'Tokenizer',
  'VectorQuantizer',
  'ema_update',
  'load',
  'nearest_codes',
  'reflect',
  'rotate',
  'straight_through',
]


def __getattr__(name):
  # Whoever wants the layer alone need not wait for what reads checkpoints.
  if name == 'load':
    from rvq_jax.evaluation.load import load

    return load
  if name == 'Tokenizer':
    from rvq_jax.evaluation.tokenizer import Tokenizer

    return Tokenizer
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
