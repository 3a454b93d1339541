"""The quantizers by their names in a config; each imported on use."""

import importlib
from typing import Any

import flax.linen as nn

QUANTIZERS = {  # name -> class
  'vq': 'rvq_jax.quantize.vector_quantizer.VectorQuantizer',
  'residual': 'rvq_jax.quantize.residual.ResidualQuantizer',
  'multiscale': 'rvq_jax.quantize.multiscale.MultiscaleQuantizer',
  'product': 'rvq_jax.quantize.product.ProductQuantizer',
  'gumbel': 'rvq_jax.quantize.gumbel.GumbelQuantizer',
  'fsq': 'rvq_jax.quantize.fsq.FSQ',
  'simvq': 'rvq_jax.quantize.simvq.SimVQ',
}


def quantizer_class(name: str) -> type[nn.Module]:
  """The class of the quantizer called `name`; ValueError if there is none."""
  if name not in QUANTIZERS:
    raise ValueError(
      f'quantizer: expected one of {", ".join(QUANTIZERS)}; got {name!r}'
    )
  module, _, cls = QUANTIZERS[name].rpartition('.')
  return getattr(importlib.import_module(module), cls)


def make_quantizer(name: str = 'vq', **arguments: Any) -> nn.Module:
  """The linen module called `name`, from z [..., C] to `QuantizerOutput`."""
  return quantizer_class(name)(**arguments)
