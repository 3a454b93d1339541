"""What every quantizer takes and returns."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import count_codes, valid_rows
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.losses import LOSS_FORMS

INITS = ('data', 'normal')
_COUNT = 2**31 - 1
_MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)


class Field(NamedTuple):
  """What an argument or a config field may hold.

  Attributes:
    kind: int, float, bool or str.
    low: least value.
    high: greatest value.
    choices: allowed values, or None.
    optional: None is allowed.
  """

  kind: type
  low: float = -float('inf')
  high: float = float('inf')
  choices: tuple | None = None
  optional: bool = False


FIELDS = {
  'codebook_size': Field(int, 1, _COUNT),
  'code_dim': Field(int, 1, 2**20, optional=True),
  'estimator': Field(str, choices=tuple(ESTIMATORS)),
  'ema': Field(bool),
  'decay': Field(float, 0, 1),
  'eps': Field(float, 1e-30, 1),
  'commitment_weight': Field(float, 0),
  'codebook_weight': Field(float, 0),
  'loss_form': Field(str, choices=LOSS_FORMS),
  'cosine': Field(bool),
  'dead_code_threshold': Field(float, 0),
  'split_fraction': Field(float, 1e-30, 1),
  'init_from': Field(str, choices=INITS),
  'max_scale': Field(float, 1e-30),
  'freeze': Field(bool),
  'depth': Field(int, 1, 2**10),
  'heads': Field(int, 1, 2**10),
  'temperature_start': Field(float, 1e-30),
  'temperature_end': Field(float, 1e-30),
  'temperature_steps': Field(int, 1, _COUNT),
  'kl_weight': Field(float, 0),
}
"""Every argument that users set, of all quantizers."""


def fault(value: Any, field: Field) -> str | None:
  """What was expected of a value, or None if it is valid."""
  if value is None:
    return None if field.optional else 'a value'
  kind = (int, float) if field.kind is float else field.kind
  if not isinstance(value, kind) or (
    isinstance(value, bool) and field.kind is not bool
  ):
    names = {int: 'an integer', float: 'a number', str: 'text'}
    return names.get(field.kind, 'True or False')
  if field.choices and value not in field.choices:
    return f'one of {", ".join(map(str, field.choices))}'
  if field.kind in (int, float) and not field.low <= value <= field.high:
    if field.high >= _COUNT:
      return f'at least {field.low:g}'
    return f'a value from {field.low:g} to {field.high:g}'
  if field.kind is float and abs(value) > _MAX_FLOAT32:
    return 'a finite number that float32 can hold'
  return None


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
    expected = fault(value, FIELDS[name]) if name in FIELDS else None
    if expected:
      raise ValueError(f'{name}: expected {expected}, got {value!r}')


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
