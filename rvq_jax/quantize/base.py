"""What every quantizer takes and returns."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import count_codes, valid_rows
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.losses import LOSS_FORMS

INITS = ('data', 'normal')
_CHOICES = {
  'estimator': tuple(ESTIMATORS),
  'loss_form': LOSS_FORMS,
  'init_from': INITS,
}
_RANGES = {
  'codebook_size': (1, 2**31 - 1),
  'code_dim': (1, 2**20),
  'depth': (1, 2**10),
  'heads': (1, 2**10),
  'decay': (0.0, 1.0),
  'eps': (1e-30, 1.0),
  'commitment_weight': (0.0, float('inf')),
  'codebook_weight': (0.0, float('inf')),
  'dead_code_threshold': (0.0, float('inf')),
  'split_fraction': (1e-30, 1.0),
  'max_scale': (1e-30, float('inf')),
  'temperature_start': (1e-30, float('inf')),
  'temperature_end': (1e-30, float('inf')),
  'temperature_steps': (1, 2**31 - 1),
  'kl_weight': (0.0, float('inf')),
}
_WHOLE = ('codebook_size', 'code_dim', 'depth', 'heads', 'temperature_steps')


@flax.struct.dataclass
class QuantizerOutput:
  """What a quantizer returns for inputs [..., C].

  Attributes:
    quantized: the codes in place of the inputs, [..., C] in the input's dtype.
    ids: index of each code, [...] int32; [..., L] where a position has L codes.
    loss: weighted commitment and codebook loss, float32 scalar.
    counts: how often each code was chosen in the global batch, float32 [K];
      [L, K] where each of the L codes of a position has a codebook of its own.
    metrics: name -> float32 scalar over this device's batch; see
      `VectorQuantizer`.
  """

  quantized: jax.Array
  ids: jax.Array
  loss: jax.Array
  counts: jax.Array
  metrics: dict[str, jax.Array]


def validate(**arguments: Any) -> None:
  """Raises ValueError for a quantizer's argument out of its range.

  Args:
    **arguments: arguments of a quantizer by name; others are ignored.

  Raises:
    ValueError: one line with what was expected and what came.
  """
  for name, value in arguments.items():
    if name in _CHOICES and value not in _CHOICES[name]:
      raise ValueError(
        f'{name}: expected one of {", ".join(_CHOICES[name])}; got {value!r}'
      )
    if name not in _RANGES or (name == 'code_dim' and value is None):
      continue
    low, high = _RANGES[name]
    kind = int if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
      wanted = 'a whole number' if name in _WHOLE else 'a number'
      raise ValueError(f'{name}: expected {wanted}, got {value!r}')
    if not low <= value <= high:
      raise ValueError(
        f'{name}: expected a value from {low:g} to {high:g}, got {value!r}'
      )


def check_input(z: jax.Array, mask: jax.Array | None) -> None:
  """Raises ValueError unless z is float [..., C] and mask, if any, [...]."""
  if z.ndim < 1 or not jnp.issubdtype(z.dtype, jnp.floating):
    raise ValueError(f'expected float [..., C], got {z.dtype} {z.shape}')
  if mask is not None and mask.shape != z.shape[:-1]:
    raise ValueError(
      f'expected a mask {z.shape[:-1]} for inputs {z.shape}, got {mask.shape}'
    )


def arguments(module: nn.Module) -> dict[str, Any]:
  """The arguments that a linen module was made with, by name."""
  names = [field.name for field in dataclasses.fields(module)]
  return {n: getattr(module, n) for n in names if n not in ('parent', 'name')}


def project_out(module: nn.Module, codes: jax.Array) -> jax.Array:
  """What the module's Dense 'project_out', where it has one, makes of codes.

  Args:
    module: a bound quantizer.
    codes: [..., D], float32.

  Returns:
    [..., C], float32.
  """
  if not module.has_variable('params', 'project_out'):
    return codes
  dense = module.get_variable('params', 'project_out')
  bias = dense['bias'].reshape((1,) * (codes.ndim - 1) + (-1,))
  return codes @ dense['kernel'] + bias


def prepare(
  module: nn.Module, z: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Checks a quantizer's arguments and inputs and makes rows of them.

  Args:
    module: the quantizer.
    z: inputs [..., C], float.
    mask: positions that count [...], bool, or None.

  Returns:
    z as [N, C] float32, and the rows that count, bool [N].

  Raises:
    ValueError: see `validate` and `check_input`.
  """
  validate(**arguments(module))
  check_input(z, mask)
  e = z.astype(jnp.float32).reshape(-1, z.shape[-1])
  return e, jnp.ones(len(e), bool) if mask is None else mask.reshape(-1)


def count(
  module: nn.Module, ids: jax.Array, e: jax.Array, rows: jax.Array
) -> jax.Array:
  """Counts [K] of ids [N] in the global batch, of finite rows that count.

  `init` runs outside of any mapped axis.
  """
  axis_name = None if module.is_initializing() else module.axis_name
  valid = valid_rows(e, rows)
  return count_codes(
    ids, module.codebook_size, valid=valid, axis_name=axis_name
  )


def finish(
  z: jax.Array, quantized: jax.Array, ids: jax.Array, *, project: bool, **rest
) -> QuantizerOutput:
  """The output in the shape and dtype of z.

  Args:
    z: inputs [..., C].
    quantized: [N, D].
    ids: [N].
    project: lead from D to C by a Dense 'project_out' of the calling module.
    **rest: loss, counts and metrics.

  Returns:
    `QuantizerOutput`.
  """
  quantized = quantized.reshape(z.shape[:-1] + quantized.shape[1:])
  if project:
    quantized = nn.Dense(z.shape[-1], name='project_out')(quantized)
  return QuantizerOutput(
    quantized.astype(z.dtype), ids.reshape(z.shape[:-1]), **rest
  )
