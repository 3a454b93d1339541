"""Objects of a checked flat config; below, nothing sees the flat dictionary.

Whatever opens a model imports this file: optax and the training loop stay out
of it, or inside of a function.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.registry import make_quantizer, takes
from rvq_jax.training.config import QUANTIZER_FIELDS

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


def build_model(flat: Mapping[str, Any], *, axis_name=None) -> VQVAE:
  """The model of a checked flat config; axis_name as of `VQVAE`."""
  model = {
    name.removeprefix('model.'): value
    for name, value in flat.items()
    if name.startswith('model.')
  }
  name = model.pop('quantizer')
  model.pop('quantize_after')  # of the train step
  quantizer = {field: model.pop(field) for field in QUANTIZER_FIELDS}
  quantizer['freeze'] = 'codes' in flat['freeze']
  quantizer = {n: value for n, value in quantizer.items() if takes(name, n)}
  if name == 'multiscale':
    from rvq_jax.quantize.scales import default_sides

    grid = flat['data.image_size'] // flat['model.factor']
    quantizer['sides'] = tuple(quantizer['sides'] or default_sides(grid))
  model['widths'] = tuple(model['widths'])
  model['dtype'] = jnp.dtype(model['dtype']).type
  model['axis_name'] = axis_name
  code_dim, num_heads = model.pop('code_dim'), model.pop('num_heads')
  return VQVAE(
    encoder=Encoder(code_dim=code_dim, **model),
    vq=make_quantizer(name, axis_name=axis_name, **quantizer),
    decoder=Decoder(num_heads=num_heads, **model),
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
