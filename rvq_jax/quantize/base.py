"""What every quantizer shares: arguments, inputs, projections, outputs."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import count_codes, row_weights, unit
from rvq_jax.quantize.estimators import ESTIMATORS
from rvq_jax.quantize.fields import Field, fault
from rvq_jax.quantize.losses import LOSS_FORMS

INITS = ('data', 'normal')
SPLIT_RULES = ('count', 'distortion')

FIELDS = {
  'codebook_size': Field(int, 1, 2**31 - 1),
  'code_dim': Field(int, 1, 2**20, optional=True),
  'estimator': Field(str, choices=ESTIMATORS),
  'ema': Field(bool),
  'decay': Field(float, 0, 1),
  'eps': Field(float, 1e-30, 1),
  'commitment_weight': Field(float, 0),
  'codebook_weight': Field(float, 0),
  'loss_form': Field(str, choices=LOSS_FORMS),
  'cosine': Field(bool),
  'dead_code_threshold': Field(float, 0),
  'split_by': Field(str, choices=SPLIT_RULES),
  'split_fraction': Field(float, 1e-30, 1),
  'init_from': Field(str, choices=INITS),
  'max_scale': Field(float, 1e-30),
  'freeze': Field(bool),
  'depth': Field(int, 1, 64),
  'heads': Field(int, 1, 64),
  'sides': Field(tuple, optional=True),
  'temperature_start': Field(float, 1e-30),
  'temperature_end': Field(float, 1e-30),
  'temperature_steps': Field(int, 1, 2**31 - 1),
  'kl_weight': Field(float, 0),
}
"""The arguments of the quantizers, by name."""


def validate(**arguments: Any) -> None:
  """Raises ValueError for an argument in `FIELDS` that is out of its range."""
  for name, value in arguments.items():
    expected = fault(value, FIELDS[name]) if name in FIELDS else None
    if expected:
      raise ValueError(f'{name}: expected {expected}, got {value!r}')
  if arguments.get('estimator') == 'diveq' and (
    arguments.get('ema')
    or arguments.get('loss_form', 'two_weights') != 'two_weights'
    or arguments['commitment_weight']
    or arguments['codebook_weight']
  ):
    raise ValueError(
      "estimator: 'diveq' trains learned codes by itself: expected ema=False, "
      "loss_form='two_weights' and both its weights 0"
    )


def arguments(module: nn.Module) -> dict[str, Any]:
  """The arguments that a linen module was made with, by name."""
  names = [field.name for field in dataclasses.fields(module)]
  return {n: getattr(module, n) for n in names if n not in ('parent', 'name')}


@flax.struct.dataclass
class QuantizerOutput:
  """What a quantizer returns for inputs [..., C].

  Attributes:
    quantized: the codes in place of the inputs, [..., C] in the input's dtype.
    ids: index of each code, [...] int32; [..., L] with L codes per position.
    loss: weighted commitment and codebook loss, float32 scalar; with an
      axis_name the global batch's is the mean over devices.
    counts: how often each code was chosen in the global batch, float32 [K];
      [L, K] with L codes per position, each from a codebook of its own.
    metrics: name -> float32 scalar over this device's batch; see
      `VectorQuantizer`.
  """

  quantized: jax.Array
  ids: jax.Array
  loss: jax.Array
  counts: jax.Array
  metrics: dict[str, jax.Array]


def flatten(
  module: nn.Module, z: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Checks a quantizer's arguments and inputs and flattens the inputs.

  Args:
    module: the quantizer.
    z: inputs [..., C].
    mask: valid positions [...], bool, or None.

  Returns:
    z as [N, C] float32, and the mask as bool [N].

  Raises:
    ValueError: an argument is out of range, z is not a float array, or the
      mask has another shape.
  """
  validate(**arguments(module))
  if z.ndim < 1 or not jnp.issubdtype(z.dtype, jnp.floating):
    raise ValueError(f'expected float [..., C], got {z.dtype} {z.shape}')
  if mask is not None and mask.shape != z.shape[:-1]:
    raise ValueError(
      f'expected a mask {z.shape[:-1]} for inputs {z.shape}, got {mask.shape}'
    )
  e = z.astype(jnp.float32).reshape(-1, z.shape[-1])
  return e, jnp.ones(len(e), bool) if mask is None else mask.reshape(-1)


def project_in(e: jax.Array, dim: int) -> jax.Array:
  """e [N, C] as [N, dim], by a Dense of the calling module if dim is not C."""
  return e if dim == e.shape[-1] else nn.Dense(dim, name='project_in')(e)


def project_out(module: nn.Module, codes: jax.Array) -> jax.Array:
  """Codes [..., D] as [..., C], by 'project_out' of a bound module if any."""
  if not module.has_variable('params', 'project_out'):
    return codes
  dense = module.get_variable('params', 'project_out')
  bias = dense['bias'].reshape((1,) * (codes.ndim - 1) + (-1,))
  return codes @ dense['kernel'] + bias


def mapped_axis(module: nn.Module):
  """The module's axis_name; None in `init`, which runs outside of any."""
  return None if module.is_initializing() else module.axis_name


def estimate(
  module: nn.Module,
  e: jax.Array,
  q: jax.Array,
  ids: jax.Array | None,
  mask: jax.Array,
) -> jax.Array:
  """q [N, D], whose gradient reaches e [N, D] as the estimator says."""
  return ESTIMATORS[module.estimator](
    e,
    q,
    ids=ids,
    num_codes=module.codebook_size,
    mask=mask,
    max_scale=module.max_scale,
    axis_name=mapped_axis(module),
  )


def count(
  module: nn.Module, ids: jax.Array, e: jax.Array, mask: jax.Array
) -> jax.Array:
  """Counts [K] of the ids [N] of valid rows e [N, D], in the global batch.

  With weights [N] as the mask, what their rows count for.
  """
  return count_codes(
    ids,
    module.codebook_size,
    weight=row_weights(e, mask),
    axis_name=mapped_axis(module),
  )


def finish(
  z: jax.Array,
  quantized: jax.Array,
  ids: jax.Array,
  loss: jax.Array,
  counts: jax.Array,
  metrics: dict[str, jax.Array],
  *,
  project: bool = False,
) -> QuantizerOutput:
  """The output for z [..., C], in its dtype; no gradient through the metrics.

  quantized is [N, D], ids [N] or [N, L]. A Dense 'project_out' of the calling
  module leads from D to C where they differ, or with `project`.
  """
  quantized = quantized.reshape(z.shape[:-1] + quantized.shape[1:])
  if project or quantized.shape[-1] != z.shape[-1]:
    quantized = nn.Dense(z.shape[-1], name='project_out')(quantized)
  ids = ids.reshape(z.shape[:-1] + ids.shape[1:])
  metrics = jax.lax.stop_gradient(metrics)
  return QuantizerOutput(quantized.astype(z.dtype), ids, loss, counts, metrics)


def embedding(module: nn.Module, part: str | None = None) -> jax.Array:
  """The codes [K, D] of a bound `VectorQuantizer`, or of its part."""

  def get(collection, name):
    if part is None:
      return module.get_variable(collection, name)
    return module.get_variable(collection, part)[name]

  if module.ema:
    return get('codebook', 'embedding')
  codes = get('params', 'embedding') + get('codebook', 'offset')
  return unit(codes) if module.cosine else codes


def make_parts(
  module: nn.Module, cls: type[nn.Module], prefix: str, number: int, dim: int
) -> list[nn.Module]:
  """Quantizers prefix_0, prefix_1 ... of class `cls` and code_dim `dim`.

  They are parts of the quantizer `module`, whose other arguments they take.
  """
  own = {
    name: value
    for name, value in arguments(module).items()
    if name in cls.__dataclass_fields__
  } | {'code_dim': dim}
  return [cls(**own, name=f'{prefix}_{i}') for i in range(number)]


def combine(outputs: list[QuantizerOutput]) -> dict[str, Any]:
  """ids [N, L], counts [L, K], and mean loss and metrics of L parts."""
  number = len(outputs)
  return {
    'ids': jnp.stack([out.ids for out in outputs], axis=-1),
    'loss': sum(out.loss for out in outputs) / number,
    'counts': jnp.stack([out.counts for out in outputs]),
    'metrics': {
      name: sum(out.metrics[name] for out in outputs) / number
      for name in outputs[0].metrics
    },
  }
