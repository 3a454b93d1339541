"""Rotated Vector Quantization in JAX and Flax; R is rotation, not residual."""

from rvq_jax.evaluation.tokenizer import Tokenizer, load
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.codebook import Codebook, ema_update
from rvq_jax.quantize.gradients import reflect, rotate, straight_through
from rvq_jax.quantize.search import nearest_codes
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

__all__ = [
  'VQVAE',
  'Codebook',
  'Tokenizer',
  'VectorQuantizer',
  'ema_update',
  'load',
  'nearest_codes',
  'reflect',
  'rotate',
  'straight_through',
]
