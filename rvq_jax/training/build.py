"""Builds the objects of a flat config; below, nothing sees the dictionary.

Every program that opens a model imports this file: imports of optax and of the
training loop stand inside functions.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
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


def build_data(flat: Mapping[str, Any], workdir=None):
  """The `Dataset` and its `TrainLoader`, which may decode it into memory.

  A folder is divided as WORKDIR/split.json says, if a run wrote it.
  """
  from rvq_jax.data import datasets, loaders

  dataset = datasets.open_dataset(
    flat['data.name'],
    split=flat['data.split'],
    data_dir=flat['data.data_dir'],
    split_file=workdir and Path(workdir) / datasets.SPLIT_FILE,
  )
  return dataset, loaders.make_train_loader(
    dataset.train,
    batch_size=flat['batch_size'],
    image_size=flat['data.image_size'],
    crop=flat['data.crop'],
    crop_scale=(flat['data.crop_scale'], 1.0),
    seed=flat['seed'],
    num_workers=flat['data.num_workers'],
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def build_schedule(flat: Mapping[str, Any], num_steps: int):
  """Step -> learning rate."""
  from rvq_jax.training.optimizer import make_schedule

  return make_schedule(
    flat['optimizer.learning_rate'],
    num_steps=num_steps,
    warmup_steps=flat['optimizer.warmup_steps'],
    schedule=flat['optimizer.schedule'],
  )


def build_optimizer(flat: Mapping[str, Any], num_steps: int):
  """AdamW as an optax transformation."""
  from rvq_jax.training.optimizer import make_optimizer

  return make_optimizer(
    build_schedule(flat, num_steps),
    weight_decay=flat['optimizer.weight_decay'],
    clip_norm=flat['optimizer.clip_norm'],
    b2=flat['optimizer.b2'],
    freeze=flat['freeze'],
  )


def build_objective(flat: Mapping[str, Any], num_steps: int):
  """The `Objective`."""
  from rvq_jax.training.objective import Objective

  fields = {
    name.removeprefix('objective.'): value
    for name, value in flat.items()
    if name.startswith('objective.')
  }
  dtype = jnp.dtype(flat['model.dtype']).type
  return Objective(num_steps=num_steps, dtype=dtype, **fields)


def build_step(flat: Mapping[str, Any], num_steps: int):
  """The `TrainStep` of a run of num_steps, in its last phase.

  Raises:
    ValueError: the phases do not fit into the run.
  """
  from rvq_jax.training.step import TrainStep

  objective = build_objective(flat, num_steps)
  late, start = flat['model.quantize_after'], objective.discriminator_start
  if late >= num_steps:
    raise ValueError(
      f'config.model.quantize_after: expected less than the {num_steps} steps '
      f'of the run, got {late}; with 0 all steps quantize'
    )
  if objective.adversarial_weight and late > start:
    raise ValueError(
      f'config.model.quantize_after: expected at most {start}, the steps '
      'before the discriminator learns to tell quantized images from real '
      f'ones, got {late}'
    )
  return TrainStep(
    build_model(flat),
    build_optimizer(flat, num_steps),
    objective,
    seed=flat['seed'],
    flip=flat['data.flip'],
    colors=flat['data.colors'],
    params_ema_decay=flat['optimizer.params_ema'],
    accumulate_steps=flat['accumulate_steps'],
    adversarial=objective.adversarial_weight > 0,
  )


def build_start(flat: Mapping[str, Any], init, template):
  """The collections that a new run starts from; None: random ones.

  `init` gives a trained model, or is None; template has the state's shapes.

  Raises:
    ValueError: the model does not fit; with `quantize_after` the encoder would
      drift away from its codes; or a new encoder would be frozen.
  """
  from rvq_jax.training import initial

  late, freeze = flat['model.quantize_after'], flat['freeze']
  if init is None:
    if 'encoder' in freeze:
      raise ValueError(
        'config.freeze: expected a trained encoder, from --init or a '
        f'checkpoint, with {freeze!r}, got a new run'
      )
    return None
  if late:
    raise ValueError(
      '--init: expected config.model.quantize_after = 0, for the codes are '
      f'there from the start, got {late}'
    )
  model = init()
  scale = _vectors(flat) / _vectors(model.config)
  return initial.collections(model, template, flat, scale=scale)


def _vectors(flat):
  """Vectors per codebook update: microbatch size times positions."""
  side = flat['data.image_size'] // flat['model.factor']
  return flat['batch_size'] / flat['accumulate_steps'] * side**2
