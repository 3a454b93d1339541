"""The one place that knows which fields a config has and what they may hold.

`ml_collections` takes `codebook_size=-5` or `widths=32` without a word, so
every value is checked here, before anything is built.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from rvq_jax.models.encoder import stage_plan
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.base import INITS
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.losses import LOSS_FORMS
from rvq_jax.quantize.registry import QUANTIZERS, takes
from rvq_jax.training.optimizer import SCHEDULES


class Field(NamedTuple):
  """What a config field may hold.

  Attributes:
    kind: int, float, bool, str or tuple (of ints).
    low: least value.
    high: greatest value.
    choices: allowed values, or None.
    optional: None is allowed.
    resumable: may differ from the config that a run was started with.
  """

  kind: type
  low: float = -float('inf')
  high: float = float('inf')
  choices: tuple | None = None
  optional: bool = False
  resumable: bool = False


_MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)
_COUNT = Field(int, 1, 2**31 - 1)
_FREE_COUNT = Field(int, 0, 2**31 - 1, resumable=True)
_QUANTIZER = {
  'codebook_size': _COUNT,
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
  'freeze': Field(bool, resumable=True),
  'depth': Field(int, 1, 64),
  'heads': Field(int, 1, 64),
  'temperature_steps': _COUNT,
  'kl_weight': Field(float, 0),
}
FIELDS = {
  'seed': Field(int, 0, 2**31 - 1),
  'batch_size': _COUNT,
  'accumulate_steps': Field(int, 1, 2**31 - 1, resumable=True),
  'codebook_shards': Field(int, 1, 2**20, resumable=True),
  'num_epochs': Field(int, 1, 10**7, resumable=True),
  'num_steps': Field(int, 1, 2**31 - 1, optional=True, resumable=True),
  'steps_per_dispatch': Field(int, 1, 10**6),
  'log_every': Field(int, 1, 2**31 - 1, resumable=True),
  'eval_every': _FREE_COUNT,
  'checkpoint_every': _FREE_COUNT,
  'keep_checkpoints': Field(int, 1, 10**6, resumable=True),
  'exact_resume': Field(bool, resumable=True),
  'data.name': Field(str),
  'data.data_dir': Field(str, optional=True, resumable=True),
  'data.split': Field(str, choices=('paper', 'official')),
  'data.image_size': Field(int, 1, 2**14),
  'data.crop': Field(str, choices=('none', 'random', 'random_resized')),
  'data.crop_scale': Field(float, 1e-3, 1),
  'data.flip': Field(bool),
  'data.in_memory': Field(str, choices=('auto', 'yes', 'no')),
  'data.on_device': Field(bool, resumable=True),
  'data.num_workers': Field(int, 0, 1024, resumable=True),
  'model.widths': Field(tuple),
  'model.factor': Field(int, choices=(2, 4, 8, 16, 32, 64)),
  'model.num_res_blocks': Field(int, 0, 1000),
  'model.num_heads': _COUNT,
  'model.code_dim': Field(int, 1, 2**20),
  'model.quantizer': Field(str, choices=tuple(QUANTIZERS)),
  'model.dtype': Field(str, choices=('float32', 'bfloat16')),
  'model.remat': Field(bool, resumable=True),
  **{f'model.{name}': field for name, field in _QUANTIZER.items()},
  'optimizer.learning_rate': Field(float, 0),
  'optimizer.weight_decay': Field(float, 0),
  'optimizer.schedule': Field(str, choices=SCHEDULES),
  'optimizer.warmup_steps': Field(int, 0, 2**31 - 1),
  'optimizer.clip_norm': Field(float, 0),
  'optimizer.params_ema': Field(float, 0, 0.9999999),
}


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'model.factor': 8, ...} of a nested config, in order."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping) or hasattr(value, 'items'):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def _fault(name, value, field):
  """What is wrong with a value, or None."""
  if value is None:
    return None if field.optional else 'a value'
  if field.kind is tuple:
    whole = isinstance(value, list) and value
    if not whole or any(type(v) is not int or v < 1 for v in value):
      return 'whole numbers above 0, as (64, 128, 256)'
    return None
  kind = (int, float) if field.kind is float else field.kind
  if not isinstance(value, kind) or (
    isinstance(value, bool) and field.kind is not bool
  ):
    names = {int: 'a whole number', float: 'a number', str: 'text'}
    return names.get(field.kind, 'True or False')
  if field.choices and value not in field.choices:
    return f'one of {", ".join(map(str, field.choices))}'
  if field.kind in (int, float) and not field.low <= value <= field.high:
    if field.high == float('inf') or field.high >= 2**31 - 1:
      return f'at least {field.low:g}'
    return f'a value from {field.low:g} to {field.high:g}'
  if field.kind is float and abs(value) > _MAX_FLOAT32:
    return 'a finite number that float32 can hold'
  return None


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Checks every field of a config.

  Args:
    config: nested mapping or ConfigDict.

  Returns:
    The config as flat JSON values.

  Raises:
    ValueError: one line that names the field, what was expected and what came.
  """
  flat = flatten(config)
  for name in flat:
    if name not in FIELDS:
      near = difflib.get_close_matches(name, FIELDS, n=1)
      hint = f'; did you mean config.{near[0]}?' if near else ''
      raise ValueError(f'config.{name}: no such field{hint}')
  for name, field in FIELDS.items():
    if name not in flat:
      raise ValueError(f'config.{name}: missing; see configs/cifar10.py')
    fault = _fault(name, flat[name], field)
    if fault:
      raise ValueError(f'config.{name}: expected {fault}, got {flat[name]!r}')
  _check_together(flat)
  return flat


def _check_together(flat):
  size, factor = flat['data.image_size'], flat['model.factor']
  if size % factor:
    raise ValueError(
      f'config.data.image_size: expected a multiple of model.factor, {factor}, '
      f'got {size}'
    )
  if flat['model.quantizer'] == 'product' and (
    flat['model.code_dim'] % flat['model.heads']
  ):
    raise ValueError(
      'config.model.heads: expected a divisor of model.code_dim, '
      f'{flat["model.code_dim"]}, got {flat["model.heads"]}'
    )
  channels = stage_plan(flat['model.widths'], factor)[-1][0]
  if channels % flat['model.num_heads']:
    raise ValueError(
      f'config.model.num_heads: expected a divisor of the last width '
      f'{channels}, got {flat["model.num_heads"]}'
    )
  _check_shards(flat)
  if flat['data.in_memory'] == 'yes' and flat['data.crop'] != 'none':
    raise ValueError(
      "config.data.in_memory: expected 'auto' or 'no' with data.crop = "
      f"{flat['data.crop']!r} (a set in memory is cropped once), got 'yes'"
    )


_MADE_OF_CODES = ('vq', 'residual', 'product')


def _check_shards(flat):
  shards, size = flat['codebook_shards'], flat['model.codebook_size']
  if shards == 1:
    return
  if size % shards:
    raise ValueError(
      f'config.codebook_shards: expected a divisor of model.codebook_size, '
      f'{size}, got {shards}'
    )
  if flat['model.quantizer'] not in _MADE_OF_CODES or not flat['model.ema']:
    raise ValueError(
      'config.codebook_shards: expected 1, or model.ema with model.quantizer '
      f'one of {", ".join(_MADE_OF_CODES)}; got {shards}'
    )


def check_devices(
  batch_size: int,
  devices: int,
  *,
  accumulate_steps: int = 1,
  codebook_shards: int = 1,
) -> None:
  """Raises ValueError unless these fields fit this many devices."""
  if batch_size % (devices * accumulate_steps):
    times = f' x {accumulate_steps} accumulate_steps'
    raise ValueError(
      f'config.batch_size: expected a multiple of the {devices} devices'
      f'{times if accumulate_steps > 1 else ""}, got {batch_size}'
    )
  if devices % codebook_shards:
    raise ValueError(
      f'config.codebook_shards: expected a divisor of the {devices} devices, '
      f'got {codebook_shards}'
    )


def check_resume(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
  """Refuses to go on with another model, optimizer or data.

  Args:
    new: the flat config of this run.
    old: the flat config that the checkpoint was made with.

  Raises:
    ValueError: lists each field that differs and must not.
  """
  missing = object()
  differ = [
    f'config.{name}: checkpoint {old.get(name)!r}, now {new.get(name)!r}'
    for name in dict.fromkeys([*old, *new])
    if old.get(name, missing) != new.get(name, missing)
    and not (name in FIELDS and FIELDS[name].resumable)
  ]
  if differ:
    raise ValueError(
      'the checkpoint in this workdir was made with another config; use '
      'another --workdir, or undo: ' + '; '.join(differ)
    )


def build_model(flat: Mapping[str, Any], *, axis_name=None) -> VQVAE:
  """The model that a checked flat config describes.

  Args:
    flat: the config.
    axis_name: mapped axis of `pmap` or `shard_map`.

  Returns:
    The model.
  """
  model = {
    name.removeprefix('model.'): value
    for name, value in flat.items()
    if name.startswith('model.')
  }
  name = model.pop('quantizer')
  quantizer = {field: model.pop(field) for field in _QUANTIZER}
  quantizer = {n: value for n, value in quantizer.items() if takes(name, n)}
  quantizer['name'] = name
  model['widths'] = tuple(model['widths'])
  model['dtype'] = jnp.dtype(model['dtype']).type
  return VQVAE(quantizer=quantizer, axis_name=axis_name, **model)


def to_json(flat: Mapping[str, Any]) -> str:
  """The flat config as indented JSON text."""
  return json.dumps(dict(flat), indent=2) + '\n'
