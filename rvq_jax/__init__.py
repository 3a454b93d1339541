"""Rotated Vector Quantization in JAX and Flax; R is rotation, not residual."""

import importlib

__version__ = '0.1.0'

_DEFINED_IN = {  # imported on first use: `rvq --help` need not wait for JAX
  'VQVAE': 'rvq_jax.models.vqvae',
  'Codebook': 'rvq_jax.quantize.codebook',
  'MultiscaleQuantizer': 'rvq_jax.quantize.multiscale',
  'ProductQuantizer': 'rvq_jax.quantize.product',
  'ResidualQuantizer': 'rvq_jax.quantize.residual',
  'TokenDataset': 'rvq_jax.tokenizer.dataset',
  'Tokenizer': 'rvq_jax.tokenizer.tokenizer',
  'VectorQuantizer': 'rvq_jax.quantize.vector_quantizer',
  'ema_update': 'rvq_jax.quantize.codebook',
  'load': 'rvq_jax.tokenizer.load',
  'nearest_codes': 'rvq_jax.quantize.search',
  'reflect': 'rvq_jax.quantize.gradients',
  'rotate': 'rvq_jax.quantize.gradients',
  'straight_through': 'rvq_jax.quantize.gradients',
}
__all__ = list(_DEFINED_IN)


def __getattr__(name):
  if name not in _DEFINED_IN:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_DEFINED_IN[name]), name)


def __dir__():
  return [*globals(), *__all__]
