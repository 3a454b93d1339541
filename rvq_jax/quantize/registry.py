"""The quantizers by name, as a config asks for them."""

import flax.linen as nn

from rvq_jax.quantize.fsq import FSQ
from rvq_jax.quantize.gumbel import GumbelQuantizer
from rvq_jax.quantize.multiple import ProductQuantizer, ResidualQuantizer
from rvq_jax.quantize.simvq import SimVQ
from rvq_jax.quantize.vector_quantizer import VectorQuantizer

QUANTIZERS = {
  'vq': VectorQuantizer,
  'residual': ResidualQuantizer,
  'product': ProductQuantizer,
  'gumbel': GumbelQuantizer,
  'fsq': FSQ,
  'simvq': SimVQ,
}


def make_quantizer(name: str = 'vq', **arguments) -> nn.Module:
  """The quantizer of that name.

  Args:
    name: one of `QUANTIZERS`.
    **arguments: of its class.

  Returns:
    A linen module that takes z [..., C] and returns `QuantizerOutput`.

  Raises:
    ValueError: there is no such quantizer.
    TypeError: its class has no such argument.
  """
  if name not in QUANTIZERS:
    raise ValueError(
      f'quantizer: expected one of {", ".join(QUANTIZERS)}; got {name!r}'
    )
  return QUANTIZERS[name](**arguments)


def takes(name: str, argument: str) -> bool:
  """Whether the quantizer called `name` has an argument of that name."""
  return argument in QUANTIZERS[name].__dataclass_fields__
