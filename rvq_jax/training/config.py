"""Checks a config, which `ml_collections` does not.

Each layer states the ranges of its arguments, and in a trace of the model the
layers refuse values that do not fit together. The check adds the name of the
config's field.
"""

import difflib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

import jax
import jax.numpy as jnp

from rvq_jax.models.lpips import MIN_SIDE
from rvq_jax.quantize.fields import MAX_INT32, Field, fields_of
from rvq_jax.quantize.registry import QUANTIZERS, quantizer_class
from rvq_jax.training import build

FIELDS = build.MODEL_FIELDS | {
  'seed': Field(int, 0, MAX_INT32),
  'batch_size': Field(int, 1, MAX_INT32),
  'accumulate_steps': Field(int, 1, MAX_INT32, before=1),
  'num_epochs': Field(int, 1, 10**7),
  'num_steps': Field(int, 1, MAX_INT32, optional=True),
  'deterministic': Field(bool, before=False),
  'log_every': Field(int, 1, MAX_INT32),
  'eval_every': Field(int, 0, MAX_INT32),
  'checkpoint_every': Field(int, 0, MAX_INT32),
  'keep_checkpoints': Field(int, 1, 10**6),
  'data.name': Field(str),
  'data.data_dir': Field(str, optional=True),
  'data.split': Field(str, choices=('paper', 'official')),
  'data.crop': Field(str, choices=('none', 'random', 'random_resized')),
  'data.crop_scale': Field(float, 1e-3, 1),
  'data.flip': Field(bool),
  'data.colors': Field(bool, before=False),
  'data.num_workers': Field(int, 0, 1024),
  'model.quantize_after': Field(int, 0, MAX_INT32, before=0),
  'objective.pixel': Field(str, choices=('mse', 'l1')),
  'objective.perceptual_weight': Field(float, 0, before=0.0),
  'objective.adversarial_weight': Field(float, 0, before=0.0),
  'objective.lecam_weight': Field(float, 0, before=0.001),
  'objective.discriminator_learning_rate': Field(float, 0, before=1e-4),
  'optimizer.learning_rate': Field(float, 0),
  'optimizer.weight_decay': Field(float, 0),
  'optimizer.schedule': Field(str, choices=('cosine', 'constant')),
  'optimizer.warmup_steps': Field(int, 0, MAX_INT32),
  'optimizer.clip_norm': Field(float, 0),
  'optimizer.b2': Field(float, 0, 0.9999999, before=0.999),
  'optimizer.params_ema': Field(float, 0, 0.9999999),
}
_CLASSES = {name: quantizer_class(name) for name in QUANTIZERS}
_CODERS = sum(build.NETWORKS.values(), ())
FIELDS |= build.layer_fields(*_CODERS, *_CLASSES.values())
"""Name -> range of every field of a config."""
_BEFORE = {n: f.before for n, f in FIELDS.items() if f.before is not MISSING}
RESUMABLE = {
  *('num_epochs', 'num_steps', 'log_every', 'eval_every', 'checkpoint_every'),
  *('keep_checkpoints', 'data.data_dir', 'data.num_workers', 'model.remat'),
  *('freeze', 'deterministic'),
}
"""Fields that may differ from the first config of a run."""


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
  """Checks a nested config in 0.1 to 0.5 s; returns it as flat JSON values.

  The path of local images becomes absolute.

  Raises:
    ValueError: one line with the field, the expected and the given value.
  """
  flat = flatten(config)
  for name in flat:
    if name not in FIELDS:
      near = difflib.get_close_matches(name, FIELDS, n=1)
      hint = f'; did you mean config.{near[0]}?' if near else ''
      raise ValueError(f'config.{name}: no such field{hint}')
  build.check_fields(flat, FIELDS)
  _check_run(flat)
  _check_model(flat)
  kind, path = build.local_path(flat['data.name'])
  if kind and '://' not in path:
    path = os.path.abspath(os.path.expanduser(path))
    flat['data.name'] = f'{kind}:{path}'
  return flat


def _check_run(flat):
  """Checks rules between fields that no layer knows."""
  quantizer, init = flat['model.quantizer'], flat['model.init_from']
  fills = [n for n, cls in _CLASSES.items() if 'init_from' in fields_of(cls)]
  filled = quantizer in fills and init == 'data'
  if flat['model.quantize_after'] and not filled:
    raise ValueError(
      'config.model.quantize_after: expected 0, or a quantizer that fills its '
      f"codes from data ({', '.join(fills)}, with init_from = 'data'), got "
      f'{quantizer} with init_from = {init!r}'
    )
  side = flat['data.image_size']
  if flat['objective.perceptual_weight'] and side < MIN_SIDE:
    raise ValueError(
      f'config.data.image_size: expected at least {MIN_SIDE} with '
      f'objective.perceptual_weight above 0, got {side}'
    )


def _check_model(flat):
  """Traces `init` as in training; names the field that a layer refuses."""
  # One block is enough. In bfloat16, attention would ask for the devices and
  # so start JAX's backend before `deterministic` is set.
  blocks, side = min(flat['model.num_res_blocks'], 1), flat['data.image_size']
  flat = flat | {'model.num_res_blocks': blocks, 'model.dtype': 'float32'}
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  try:
    init = build.build_model(flat).init
    jax.eval_shape(lambda x: init(jax.random.key(0), x, train=True), images)
  except ValueError as error:
    name, _, rest = str(error).partition(': ')
    if name == 'images':
      raise ValueError(f'config.data.image_size: {rest}') from error
    mark = '.' if f'model.{name}' in flat else ': '
    raise ValueError(f'config.model{mark}{error}') from error


def completed(flat: Mapping[str, Any], source) -> dict[str, Any]:
  """A stored flat config of any version, with the fields of this version.

  A missing field gets its `Field.before`. One log line names the fields that
  this version lacks and ignores.
  """
  if unknown := [name for name in flat if name not in FIELDS]:
    logging.warning(
      '%s: another version of rvq_jax wrote it; ignored: %s',
      source,
      ', '.join(f'config.{name}' for name in unknown),
    )
  return _BEFORE | flat


def check_devices(flat: Mapping[str, Any], devices: int) -> None:
  """Raises ValueError unless the devices divide a microbatch evenly."""
  size, steps = flat['batch_size'], flat['accumulate_steps']
  if size % (devices * steps):
    times = f' x {steps} accumulate_steps' if steps > 1 else ''
    raise ValueError(
      'config.batch_size: expected a multiple of the '
      f'{devices} devices{times}, got {size}'
    )


def other_version(detail: str = '') -> ValueError:
  """The error for a checkpoint that this version opens, but cannot resume."""
  return ValueError(
    'another version of rvq_jax made the checkpoint in this workdir: it opens '
    'for encoding and evaluation, but cannot be resumed; use another '
    f'--workdir{detail}'
  )


def check_resume(
  new: Mapping[str, Any], old: Mapping[str, Any], *, same_images: bool = False
) -> None:
  """Refuses to resume `old` with another model, optimizer or data.

  A log line names the other fields that differ.

  Args:
    same_images: the folders of both configs hold the same images.

  Raises:
    ValueError: another version made the checkpoint, or fields differ that must
      not; lists them.
  """
  old = _BEFORE | old
  if unknown := sorted(new.keys() ^ old.keys()):
    raise other_version(f' (config.{", config.".join(unknown)})')
  may = RESUMABLE | ({'data.name'} if same_images else set())
  differ = {
    name: f'config.{name}: checkpoint {old[name]!r}, now {new[name]!r}'
    for name in new
    if old[name] != new[name]
  }
  if refused := [differ[name] for name in differ if name not in may]:
    raise ValueError(
      'the checkpoint in this workdir has another config; use another '
      '--workdir, or undo: ' + '; '.join(refused)
    )
  if differ:
    logging.info('resumes with another config: %s', '; '.join(differ.values()))


def to_json(flat: Mapping[str, Any]) -> str:
  """The flat config as indented JSON text."""
  return json.dumps(dict(flat), indent=2) + '\n'
