"""Objects of a checked flat config; below, nothing sees the flat dictionary.

Opening a tokenizer imports this file, so optax and all else that only training
needs is imported inside of functions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.registry import make_quantizer, takes
from rvq_jax.training.config import QUANTIZER_FIELDS


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
