"""Rotated Vector Quantization in JAX and Flax; R is rotation, not residual."""

import importlib

from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.codebook import Codebook, ema_update
from rvq_jax.quantize.gradients import reflect, rotate, straight_through
from rvq_jax.quantize.search import nearest_codes
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

__version__ = '0.1.0'

__all__ = [
  'VQVAE',
  'Codebook',
  'MultiscaleQuantizer',
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

_ON_FIRST_USE = {  # what VectorQuantizer alone need not wait for
  'MultiscaleQuantizer': 'rvq_jax.quantize.multiscale',
  'ProductQuantizer': 'rvq_jax.quantize.product',
  'ResidualQuantizer': 'rvq_jax.quantize.residual',
  'Tokenizer': 'rvq_jax.evaluation.tokenizer',
  'load': 'rvq_jax.evaluation.load',
}


def __getattr__(name):
  if name not in _ON_FIRST_USE:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
