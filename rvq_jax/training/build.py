"""Builds the objects of a flat config; below, nothing sees the dictionary.

Every program that opens a model imports this file: imports of optax and of the
training loop stand inside functions.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.fields import Field, fault, fields_of
from rvq_jax.quantize.registry import QUANTIZERS, quantizer_class, takes

MODEL_FIELDS = {
  'freeze': Field(str, choices=('', 'codes', 'encoder,codes')),
  'data.image_size': Field(int, 1, 2**14),
  'model.quantizer': Field(str, choices=tuple(QUANTIZERS)),
  'model.dtype': Field(str, choices=('float32', 'bfloat16')),
}
"""The fields that a model needs besides its layers' fields."""
LAYERS_ONLY = {
  *('eps', 'max_scale', 'kl_weight', 'levels', 'freeze'),
  *('temperature_start', 'temperature_end'),
}
"""Arguments of layers without a field in a config.

Earlier versions had fields for the first three. Their runs and exports still
open: the three change only training.
"""

_HASHED = (
  'widths factor num_res_blocks num_heads code_dim quantizer codebook_size '
  'activation cosine depth heads dtype'
).split()


def architecture(flat: Mapping[str, Any], sides=None) -> str:
  """The fields that decide, with the arrays, which function a model computes.

  The hashes of a model begin with this text: it must not change.

  Args:
    flat: checked config.
    sides: of the scales of a multi-scale tokenizer, or None.

  Returns:
    A JSON object.
  """
  fields = {name: flat[f'model.{name}'] for name in _HASHED}
  fields |= {'sides': sides} if sides else {}
  return json.dumps(fields, sort_keys=True)


def image_size(flat: Mapping[str, Any]) -> int:
  """Side of the training images, in pixels."""
  return flat['data.image_size']


def quantize_after(flat: Mapping[str, Any]) -> int:
  """The last step without a codebook."""
  return flat['model.quantize_after']


def keeps_averages(flat: Mapping[str, Any]) -> bool:
  """Whether checkpoints hold averages of parameters and batch statistics."""
  return bool(flat['optimizer.params_ema'])


def shared_config(flat: Mapping[str, Any]) -> dict[str, Any]:
  """A flat config for others: without the paths of this machine."""
  name = flat['data.name']
  if name.startswith('folder:'):
    name = f'folder:{os.path.basename(name.removeprefix("folder:"))}'
  return dict(flat) | {'data.name': name, 'data.data_dir': None}


def layer_fields(*layers: type[nn.Module]) -> dict[str, Field]:
  """'model.NAME' -> range of each argument of layers that a config sets.

  If layers share a name, the first layer's range counts.
  """
  result = {}
  for cls in layers:
    for name, field in fields_of(cls).items():
      if name not in LAYERS_ONLY:
        result.setdefault(f'model.{name}', field)
  return result


def check_fields(flat: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
  """Raises ValueError for a field that is missing or out of its range."""
  for name, field in fields.items():
    if name not in flat:
      raise ValueError(f'config.{name}: missing; see configs/cifar10.py')
    if expected := fault(flat[name], field):
      raise ValueError(
        f'config.{name}: expected {expected}, got {flat[name]!r}'
      )


def build_model(flat: Mapping[str, Any]) -> VQVAE:
  """The model of a flat config.

  Raises:
    ValueError: a field of the model is missing or out of its range.
  """
  check_fields(flat, MODEL_FIELDS)
  kind = flat['model.quantizer']
  quantizer = quantizer_class(kind)
  check_fields(flat, layer_fields(Encoder, Decoder, quantizer))
  flat = {n: tuple(x) if isinstance(x, list) else x for n, x in flat.items()}

  def make(cls, **values):
    for name in layer_fields(cls):
      values[name.removeprefix('model.')] = flat[name]
    return cls(**values)

  dtype = jnp.dtype(flat['model.dtype']).type
  encoder, decoder = (make(cls, dtype=dtype) for cls in (Encoder, Decoder))
  flat['model.code_dim'] = None  # the quantizer's: the encoder's channels
  if takes(kind, 'sides') and not flat['model.sides']:
    from rvq_jax.quantize.scales import default_sides

    grid = flat['data.image_size'] // encoder.factor
    flat['model.sides'] = default_sides(grid)
  freeze = {'freeze': 'codes' in flat['freeze']}
  return VQVAE(
    encoder=encoder,
    vq=make(quantizer, **(freeze if takes(kind, 'freeze') else {})),
    decoder=decoder,
    freeze_encoder='encoder' in flat['freeze'],
  )


class RunData(NamedTuple):
  """The data of a run, as arguments of `open_dataset` and `eval_batches`."""

  name: str
  split: str
  data_dir: str | None
  image_size: int
  batch_size: int


def run_data(flat: Mapping[str, Any]) -> RunData:
  """The data of a checked flat config."""
  names = 'name', 'split', 'data_dir', 'image_size'
  fields = {name: flat[f'data.{name}'] for name in names}
  return RunData(**fields, batch_size=flat['batch_size'])
