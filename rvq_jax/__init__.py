"""Discrete image tokenizers in JAX and Flax; R in rvq is rotation."""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # the same, for type checkers and editors
  from rvq_jax.models.vqvae import VQVAE as VQVAE
  from rvq_jax.quantize.codebook import Codebook as Codebook
  from rvq_jax.quantize.codebook import ema_update as ema_update
  from rvq_jax.quantize.gradients import reflect as reflect
  from rvq_jax.quantize.gradients import rotate as rotate
  from rvq_jax.quantize.gradients import straight_through as straight_through
  from rvq_jax.quantize.multiscale import (
    MultiscaleQuantizer as MultiscaleQuantizer,
  )
  from rvq_jax.quantize.product import ProductQuantizer as ProductQuantizer
  from rvq_jax.quantize.residual import ResidualQuantizer as ResidualQuantizer
  from rvq_jax.quantize.search import nearest_codes as nearest_codes
  from rvq_jax.quantize.vector_quantizer import (
    VectorQuantizer as VectorQuantizer,
  )
  from rvq_jax.tokenizer.dataset import TokenDataset as TokenDataset
  from rvq_jax.tokenizer.load import load as load
  from rvq_jax.tokenizer.tokenizer import Tokenizer as Tokenizer
else:

  def __getattr__(name):
    if name not in _DEFINED_IN:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
  return [*globals(), *__all__]
