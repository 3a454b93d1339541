"""Builds the objects of a flat config; they never see the dictionary.

Every program that opens a model imports this file, so functions import optax
and the training loop.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.data.sources import KINDS
from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.models.vqgan import VQGANDecoder, VQGANEncoder
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.fields import Field, fault, fields_of
from rvq_jax.quantize.registry import QUANTIZERS, quantizer_class

NETWORKS = {
  'paper': (Encoder, Decoder),
  'vqgan': (VQGANEncoder, VQGANDecoder),
}
"""Name -> encoder and decoder."""
MODEL_FIELDS = {
  'freeze': Field(
    str, choices=('', 'codes', 'encoder', 'encoder,codes'), before=''
  ),
  'data.image_size': Field(int, 1, 2**14),
  'model.network': Field(str, choices=tuple(NETWORKS), before='paper'),
  'model.quantizer': Field(str, choices=tuple(QUANTIZERS)),
  'model.dtype': Field(str, choices=('float32', 'bfloat16')),
}
"""The fields that a model needs besides its layers' fields."""
LAYERS_ONLY = {
  *('eps', 'max_scale', 'kl_weight', 'levels', 'freeze'),
  *('temperature_start', 'temperature_end'),
}
"""Arguments of layers without a field in a config.

Earlier versions had fields for the first three, which change only training, so
their runs and exports still open.
"""
_CODES = 'code_dim quantizer codebook_size cosine depth heads dtype'
_HASHED = {
  'paper': f'widths factor num_res_blocks num_heads activation {_CODES}',
  'vqgan': 'network ch ch_mult factor num_res_blocks attn_levels mid_attention '
  f'z_channels quant_kernel movq unit_range {_CODES}',
}


def architecture(flat: Mapping[str, Any], sides=None) -> str:
  """JSON of the fields that, with the arrays, define a model's output.

  The hashes of a model begin with this text: it must not change. `sides` are
  the scales of a multi-scale tokenizer.
  """
  names = _HASHED[flat['model.network']]
  fields = {name: flat[f'model.{name}'] for name in names.split()}
  fields |= {'inner_product': True} if flat['model.inner_product'] else {}
  fields |= {'sides': sides} if sides else {}
  if sides and flat['model.resize'] != 'keys':
    fields['resize'] = flat['model.resize']
  return json.dumps(fields, sort_keys=True)


def local_path(name: str) -> tuple[str, str]:
  """Kind and path of a data set in local files; '' for other sets."""
  kind, _, path = name.partition(':')
  full = os.path.expanduser(path)
  local = f'{kind}:' in KINDS[:3] or os.path.isabs(full) or os.path.isdir(full)
  return (kind, path) if name.startswith(KINDS) and path and local else ('', '')


class RunData:
  """The fields of a flat config that programs other than training read.

  Attributes:
    name: name of the data; see `open_dataset`.
    image_size: side of the training images, in pixels.
    quantize_after: the last step without a codebook.
    keeps_averages: checkpoints hold averages of variables.
  """

  def __init__(self, flat: Mapping[str, Any]):
    get: Any = flat.get
    self.name, self.split = get('data.name'), get('data.split')
    self.data_dir = get('data.data_dir')
    self.image_size: int = get('data.image_size')
    self.batch_size = get('batch_size')
    self.quantize_after = get('model.quantize_after', 0)
    self.keeps_averages = bool(get('optimizer.params_ema'))

  def open_dataset(self, split_file, data_dir: str | None = None):
    """The `Dataset`, divided as in training; `data_dir` is its present folder.

    split_file: the run's, or None for a new run.
    """
    from rvq_jax.data.datasets import open_dataset

    kind, path = local_path(self.name)
    name = f'{kind}:{data_dir}' if kind and data_dir else self.name
    try:
      options = {'split': self.split, 'data_dir': data_dir or self.data_dir}
      return open_dataset(name, split_file=split_file, **options)
    except ValueError as error:
      path = os.path.expanduser(local_path(name)[1])
      if not split_file or not kind or os.path.exists(path):
        raise
      raise ValueError(
        f"{error}; name the present folder of the run's images: --data_dir="
        f'FOLDER, or in training --config.data.name={kind}:FOLDER'
      ) from error


def shared_config(flat: Mapping[str, Any]) -> dict[str, Any]:
  """A flat config without the paths of this machine, to share."""
  name = flat['data.name']
  kind, path = local_path(name)
  name = f'{kind}:{os.path.basename(path)}' if kind else name
  return dict(flat) | {'data.name': name, 'data.data_dir': None}


def layer_fields(*layers: type[nn.Module]) -> dict[str, Field]:
  """'model.NAME' -> range in the first layer that has the argument NAME."""
  result = {}
  for cls in layers:
    for name, field in fields_of(cls).items():
      if name not in LAYERS_ONLY:
        result.setdefault(f'model.{name}', field)
  return result


def check_fields(flat: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
  """Raises ValueError for a missing field or a value outside its range."""
  for name, field in fields.items():
    if name not in flat:
      raise ValueError(f'config.{name}: missing; see the config cifar10')
    if expected := fault(flat[name], field):
      raise ValueError(
        f'config.{name}: expected {expected}, got {flat[name]!r}'
      )


def build_model(flat: Mapping[str, Any]) -> VQVAE:
  """The model of a flat config; ValueError for a missing or wrong field."""
  check_fields(flat, MODEL_FIELDS)
  quantizer = quantizer_class(flat['model.quantizer'])
  coders = NETWORKS[flat['model.network']]
  check_fields(flat, layer_fields(*coders, quantizer))
  flat = {n: tuple(x) if isinstance(x, list) else x for n, x in flat.items()}

  def make(cls, **values):
    for name in layer_fields(cls):
      values[name.removeprefix('model.')] = flat[name]
    return cls(**values)

  dtype = jnp.dtype(flat['model.dtype']).type
  encoder, decoder = (make(cls, dtype=dtype) for cls in coders)
  flat['model.code_dim'] = None  # the quantizer's: the encoder's channels
  takes = fields_of(quantizer)
  if 'sides' in takes and not flat['model.sides']:
    from rvq_jax.quantize.scales import default_sides

    grid = flat['data.image_size'] // encoder.factor
    flat['model.sides'] = default_sides(grid)
  frozen = flat['freeze'].split(',')
  freeze = {'freeze': 'codes' in frozen} if 'freeze' in takes else {}
  vq = make(quantizer, **freeze)
  return VQVAE(encoder, vq, decoder, 'encoder' in frozen)


def build_data(flat: Mapping[str, Any], workdir=None):
  """The `Dataset` and its `TrainLoader`, which may decode it into memory.

  If WORKDIR/split.json exists, it divides the folder, which must hold its
  images.
  """
  from rvq_jax.data import datasets, loaders

  split_file = workdir and Path(workdir) / datasets.SPLIT_FILE
  dataset = RunData(flat).open_dataset(split_file)
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

  names = 'learning_rate', 'warmup_steps', 'schedule'
  fields = {name: flat[f'optimizer.{name}'] for name in names}
  return make_schedule(num_steps=num_steps, **fields)


def build_step(flat: Mapping[str, Any], num_steps: int):
  """The `TrainStep` of the last phase; ValueError if the phases do not fit."""
  from rvq_jax.training.objective import Objective
  from rvq_jax.training.optimizer import make_optimizer
  from rvq_jax.training.step import TrainStep

  weights = {
    name.removeprefix('objective.'): value
    for name, value in flat.items()
    if name.startswith('objective.')
  }
  dtype = jnp.dtype(flat['model.dtype']).type
  objective = Objective(num_steps=num_steps, dtype=dtype, **weights)
  late, start = flat['model.quantize_after'], objective.discriminator_start
  if late >= num_steps:
    raise ValueError(
      f'config.model.quantize_after: expected less than the {num_steps} steps '
      f'of the run, got {late}; at 0 all steps quantize'
    )
  if objective.adversarial_weight and late > start:
    raise ValueError(
      f'config.model.quantize_after: expected at most {start}, since the '
      'discriminator then starts to learn from quantized images, got '
      f'{late}'
    )
  optimizer = make_optimizer(
    build_schedule(flat, num_steps),
    weight_decay=flat['optimizer.weight_decay'],
    clip_norm=flat['optimizer.clip_norm'],
    b2=flat['optimizer.b2'],
  )
  return TrainStep(
    build_model(flat),
    optimizer,
    objective,
    seed=flat['seed'],
    flip=flat['data.flip'],
    colors=flat['data.colors'],
    params_ema_decay=flat['optimizer.params_ema'],
    accumulate_steps=flat['accumulate_steps'],
    freeze=flat['freeze'],
    adversarial=objective.adversarial_weight > 0,
  )


def build_start(flat: Mapping[str, Any], init, template):
  """The first collections of a new run; None: random ones.

  `init` returns a trained model, or is None; template has the state's shapes.

  Raises:
    ValueError: the model does not fit, the encoder would drift away from its
      codes (`quantize_after`), a new encoder would be frozen, or a frozen one
      would give other tokens.
  """
  from rvq_jax.training import initial

  late, freeze = flat['model.quantize_after'], flat['freeze']
  if init is None:
    if 'encoder' in freeze.split(','):
      raise ValueError(
        f'config.freeze: {freeze!r} expected a trained encoder, got a new run: '
        'add --init, or resume a run'
      )
    return None
  if late:
    raise ValueError(
      '--init: expected config.model.quantize_after = 0, since the codes exist '
      f'from the first step, got {late}'
    )
  model, sides = init(), getattr(build_model(flat).vq, 'sides', None)
  if freeze == 'encoder,codes' and sides != model.sides:
    raise ValueError(
      f'config.model.sides: expected {model.sides}, the scales of the frozen '
      f"encoder's tokens, got {sides}"
    )
  # Vectors per codebook update: microbatch size times positions.
  ours, theirs = (
    config['batch_size']
    / config['accumulate_steps']
    * (config['data.image_size'] // config['model.factor']) ** 2
    for config in (flat, model.config)
  )
  flat = flat | {'model.sides': sides}
  options = {'scale': ours / theirs, 'swap': freeze == 'encoder'}
  return initial.collections(model, template, flat, **options)
