"""The one door of a config: the names and ranges of its fields.

`ml_collections` takes `codebook_size=-5` or `widths=32`, so every value is
checked here, before anything is built. Ranges of a layer's arguments stand on
the layer, and a trace of the model lets the layers refuse values that do not
fit together. The door adds the name of the config's field.
"""

import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.fields import Field
from rvq_jax.quantize.registry import QUANTIZERS, quantizer_class, takes
from rvq_jax.training.build import (
  MODEL_FIELDS,
  build_model,
  check_fields,
  layer_fields,
)

_INT32 = 2**31 - 1
FIELDS = MODEL_FIELDS | {
  'seed': Field(int, 0, _INT32),
  'batch_size': Field(int, 1, _INT32),
  'accumulate_steps': Field(int, 1, _INT32),
  'num_epochs': Field(int, 1, 10**7),
  'num_steps': Field(int, 1, _INT32, optional=True),
  'deterministic': Field(bool),
  'log_every': Field(int, 1, _INT32),
  'eval_every': Field(int, 0, _INT32),
  'checkpoint_every': Field(int, 0, _INT32),
  'keep_checkpoints': Field(int, 1, 10**6),
  'data.name': Field(str),
  'data.data_dir': Field(str, optional=True),
  'data.split': Field(str, choices=('paper', 'official')),
  'data.crop': Field(str, choices=('none', 'random', 'random_resized')),
  'data.crop_scale': Field(float, 1e-3, 1),
  'data.flip': Field(bool),
  'data.colors': Field(bool),
  'data.num_workers': Field(int, 0, 1024),
  'model.quantize_after': Field(int, 0, _INT32),
  'objective.pixel': Field(str, choices=('mse', 'l1')),
  'objective.perceptual_weight': Field(float, 0),
  'objective.adversarial_weight': Field(float, 0),
  'objective.lecam_weight': Field(float, 0),
  'objective.discriminator_learning_rate': Field(float, 0),
  'optimizer.learning_rate': Field(float, 0),
  'optimizer.weight_decay': Field(float, 0),
  'optimizer.schedule': Field(str, choices=('cosine', 'constant')),
  'optimizer.warmup_steps': Field(int, 0, _INT32),
  'optimizer.clip_norm': Field(float, 0),
  'optimizer.b2': Field(float, 0, 0.9999999),
  'optimizer.params_ema': Field(float, 0, 0.9999999),
}
"""The fields that no layer has; `fields` gives all."""
RESUMABLE = {
  *('num_epochs', 'num_steps', 'log_every', 'eval_every', 'checkpoint_every'),
  *('keep_checkpoints', 'data.data_dir', 'data.num_workers', 'model.remat'),
  *('freeze', 'deterministic'),
}
"""Fields that may differ from the config that a run was started with."""


@functools.cache
def fields() -> dict[str, Field]:
  """Name -> `Field` of every field of a config."""
  quantizers = map(quantizer_class, QUANTIZERS)
  return FIELDS | layer_fields(Encoder, Decoder, *quantizers)


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'model.factor': 8, ...} of a nested config, in order."""
  flat = {}
  for name, value in config.items():
    if hasattr(value, 'items'):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Checks a nested config, and gives it as flat JSON values.

  The path of a folder of images becomes absolute. The trace of the model takes
  0.1 to 0.5 s.

  Raises:
    ValueError: one line: the field, the expected value and the given one.
  """
  flat = flatten(config)
  for name in flat:
    if name not in fields():
      near = difflib.get_close_matches(name, fields(), n=1)
      hint = f'; did you mean config.{near[0]}?' if near else ''
      raise ValueError(f'config.{name}: no such field{hint}')
  check_fields(flat, fields())
  _check_run(flat)
  _check_model(flat)
  kind, _, path = flat['data.name'].partition(':')
  if kind == 'folder' and path:
    path = os.path.abspath(os.path.expanduser(path))
    flat['data.name'] = f'folder:{path}'
  return flat


def _check_run(flat):
  """The rules between fields that no layer knows."""
  quantizer, init = flat['model.quantizer'], flat['model.init_from']
  filled = takes(quantizer, 'init_from') and init == 'data'
  if flat['model.quantize_after'] and not filled:
    names = ', '.join(name for name in QUANTIZERS if takes(name, 'init_from'))
    raise ValueError(
      'config.model.quantize_after: expected 0, or a quantizer whose codes are '
      f"filled from data ({names}, with init_from = 'data'), got {quantizer} "
      f'with init_from = {init!r}'
    )
  if flat['objective.perceptual_weight']:
    from rvq_jax.models.lpips import MIN_SIDE

    if flat['data.image_size'] < MIN_SIDE:
      raise ValueError(
        f'config.data.image_size: expected at least {MIN_SIDE} with '
        'objective.perceptual_weight above 0, got '
        f'{flat["data.image_size"]}'
      )


def _check_model(flat):
  """Traces the model's `init`; names the field that a layer refuses."""
  # One block stands for all. In bfloat16, attention would ask for the devices:
  # JAX would start its backend before `deterministic` is set.
  blocks = min(flat['model.num_res_blocks'], 1)
  flat = flat | {'model.num_res_blocks': blocks, 'model.dtype': 'float32'}
  side = flat['data.image_size']
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  try:
    init = build_model(flat).init
    jax.eval_shape(lambda x: init(jax.random.key(0), x), images)
  except ValueError as error:
    name, _, rest = str(error).partition(': ')
    if name == 'images':
      message = f'data.image_size: {rest}'
    else:
      known = f'model.{name}' in flat
      message = f'model.{error}' if known else f'model: {error}'
    raise ValueError(f'config.{message}') from error


def check_devices(
  batch_size: int, devices: int, *, accumulate_steps: int = 1
) -> None:
  """Raises ValueError unless microbatches divide evenly over the devices."""
  if batch_size % (devices * accumulate_steps):
    times = f' x {accumulate_steps} accumulate_steps'
    raise ValueError(
      f'config.batch_size: expected a multiple of the {devices} devices'
      f'{times if accumulate_steps > 1 else ""}, got {batch_size}'
    )


def check_resume(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
  """Refuses to resume `old` with another model, optimizer or data.

  Raises:
    ValueError: a version of rvq_jax with other fields made the checkpoint, or
      fields differ that must not; lists them.
  """
  if new.keys() != old.keys():
    raise ValueError(
      'the checkpoint in this workdir was made by another version of rvq_jax: '
      'it opens for encoding and evaluation, but cannot be resumed; use '
      'another --workdir'
    )
  differ = [
    f'config.{name}: checkpoint {old[name]!r}, now {new[name]!r}'
    for name in new
    if old[name] != new[name] and name not in RESUMABLE
  ]
  if differ:
    raise ValueError(
      'the checkpoint in this workdir was made with another config; use '
      'another --workdir, or undo: ' + '; '.join(differ)
    )


def to_json(flat: Mapping[str, Any]) -> str:
  """The flat config as indented JSON text."""
  return json.dumps(dict(flat), indent=2) + '\n'
