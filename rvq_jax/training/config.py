"""The one door of a config: which fields it has and what they may hold.

`ml_collections` takes `codebook_size=-5` or `widths=32`, so every value is
checked here, before anything is built. The ranges of the quantizers' fields
stand on their classes.
"""

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from rvq_jax.models.encoder import stage_plan
from rvq_jax.models.layers import ACTIVATIONS, NORMS, num_groups
from rvq_jax.quantize.fields import Field, fault, fields_of
from rvq_jax.quantize.registry import (
  QUANTIZERS,
  make_quantizer,
  quantizer_class,
  takes,
)

SCHEDULES = ('cosine', 'constant')
FREEZE = ('', 'codes', 'encoder,codes')
QUANTIZER_FIELDS = (
  *('codebook_size', 'estimator', 'ema', 'decay', 'eps', 'commitment_weight'),
  *('codebook_weight', 'loss_form', 'cosine', 'dead_code_threshold'),
  *('split_by', 'split_fraction', 'init_from', 'max_scale'),
  *('depth', 'heads', 'sides', 'temperature_steps', 'kl_weight'),
)
_RANGES = {
  name: field
  for quantizer in QUANTIZERS
  for name, field in fields_of(quantizer_class(quantizer)).items()
}
_INT32 = 2**31 - 1
FIELDS = {
  'seed': Field(int, 0, _INT32),
  'batch_size': Field(int, 1, _INT32),
  'accumulate_steps': Field(int, 1, _INT32),
  'num_epochs': Field(int, 1, 10**7),
  'num_steps': Field(int, 1, _INT32, optional=True),
  'deterministic': Field(bool),
  'freeze': Field(str, choices=FREEZE),
  'log_every': Field(int, 1, _INT32),
  'eval_every': Field(int, 0, _INT32),
  'checkpoint_every': Field(int, 0, _INT32),
  'keep_checkpoints': Field(int, 1, 10**6),
  'data.name': Field(str),
  'data.data_dir': Field(str, optional=True),
  'data.split': Field(str, choices=('paper', 'official')),
  'data.image_size': Field(int, 1, 2**14),
  'data.crop': Field(str, choices=('none', 'random', 'random_resized')),
  'data.crop_scale': Field(float, 1e-3, 1),
  'data.flip': Field(bool),
  'data.colors': Field(bool),
  'data.in_memory': Field(str, choices=('auto', 'yes', 'no')),
  'data.num_workers': Field(int, 0, 1024),
  'model.widths': Field(tuple),
  'model.factor': Field(int, choices=(2, 4, 8, 16, 32, 64)),
  'model.num_res_blocks': Field(int, 0, 1000),
  'model.num_heads': Field(int, 1, _INT32),
  'model.code_dim': _RANGES['code_dim']._replace(optional=False),
  'model.quantizer': Field(str, choices=tuple(QUANTIZERS)),
  'model.dtype': Field(str, choices=('float32', 'bfloat16')),
  'model.remat': Field(bool),
  'model.norm': Field(str, choices=NORMS),
  'model.activation': Field(str, choices=tuple(ACTIVATIONS)),
  'model.quantize_after': Field(int, 0, _INT32),
  **{f'model.{name}': _RANGES[name] for name in QUANTIZER_FIELDS},
  'objective.pixel': Field(str, choices=('mse', 'l1')),
  'objective.perceptual_weight': Field(float, 0),
  'objective.adversarial_weight': Field(float, 0),
  'objective.lecam_weight': Field(float, 0),
  'objective.discriminator_learning_rate': Field(float, 0),
  'optimizer.learning_rate': Field(float, 0),
  'optimizer.codebook_learning_rate': Field(float, 0, optional=True),
  'optimizer.weight_decay': Field(float, 0),
  'optimizer.schedule': Field(str, choices=SCHEDULES),
  'optimizer.warmup_steps': Field(int, 0, _INT32),
  'optimizer.clip_norm': Field(float, 0),
  'optimizer.b2': Field(float, 0, 0.9999999),
  'optimizer.params_ema': Field(float, 0, 0.9999999),
}
RESUMABLE = {
  *('num_epochs', 'num_steps', 'log_every', 'eval_every', 'checkpoint_every'),
  *('keep_checkpoints', 'data.data_dir', 'data.num_workers', 'model.remat'),
  *('freeze', 'deterministic'),
}
"""Fields that may differ from the config that a run was started with."""


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
  """Checks every field of a nested mapping; gives it as flat JSON values.

  The path of a folder of images becomes absolute.

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
    if expected := fault(flat[name], field):
      raise ValueError(
        f'config.{name}: expected {expected}, got {flat[name]!r}'
      )
  _check_together(flat)
  kind, _, path = flat['data.name'].partition(':')
  if kind == 'folder' and path:
    path = os.path.abspath(os.path.expanduser(path))
    flat['data.name'] = f'folder:{path}'
  return flat


def _check_together(flat):
  size, factor = flat['data.image_size'], flat['model.factor']
  channels = stage_plan(flat['model.widths'], factor)[-1][0]
  heads = flat['model.num_heads']
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
  if flat['model.quantizer'] == 'multiscale' and flat['model.sides']:
    from rvq_jax.quantize.scales import default_sides  # no other needs it

    sides, grid = list(flat['model.sides']), size // factor
    if sides != sorted({*sides, grid}) or sides[-1] != grid:
      raise ValueError(
        'config.model.sides: expected sides that grow up to that of the grid, '
        f'{grid} of {size} pixels, as {default_sides(grid)}, got {tuple(sides)}'
      )
  if channels % heads:
    raise ValueError(
      'config.model.num_heads: expected a divisor of the last width '
      f'{channels}, got {heads}'
    )
  if flat['model.norm'] == 'group':
    for width in flat['model.widths']:
      num_groups(width)
  if flat['model.quantize_after']:
    _check_late_quantization(flat)
  _check_estimator(flat)
  if flat['objective.perceptual_weight']:
    from rvq_jax.models.lpips import MIN_SIDE

    if size < MIN_SIDE:
      raise ValueError(
        f'config.data.image_size: expected at least {MIN_SIDE} with '
        f'objective.perceptual_weight above 0, got {size}'
      )
  if flat['data.in_memory'] == 'yes' and flat['data.crop'] != 'none':
    raise ValueError(
      "config.data.in_memory: expected 'auto' or 'no' with data.crop = "
      f"{flat['data.crop']!r} (a set in memory is cropped once), got 'yes'"
    )


def _check_late_quantization(flat):
  name = flat['model.quantizer']
  filled = ('vq', 'residual', 'multiscale', 'product')
  if name not in filled or flat['model.init_from'] != 'data':
    raise ValueError(
      'config.model.quantize_after: expected 0, or a quantizer whose codes are '
      f"filled from data ({', '.join(filled)}, with init_from = 'data'), got "
      f'{name} with init_from = {flat["model.init_from"]!r}'
    )


def _check_estimator(flat):
  """What the quantizer would refuse when it is first called."""
  name, estimator = flat['model.quantizer'], flat['model.estimator']
  if name in ('residual', 'multiscale') and estimator in (
    'dynamic_ste',
    'diveq',
  ):
    raise ValueError(
      'config.model.estimator: expected one for several codes, as '
      f'model.quantizer = {name} has, got {estimator!r}'
    )
  arguments = {
    field: flat[f'model.{field}']
    for field in QUANTIZER_FIELDS
    if takes(name, field)
  }
  make_quantizer(name, **arguments).check()


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
    ValueError: lists each field that differs and must not.
  """
  missing = object()
  differ = [
    f'config.{name}: checkpoint {old.get(name)!r}, now {new.get(name)!r}'
    for name in dict.fromkeys([*old, *new])
    if old.get(name, missing) != new.get(name, missing)
    and name not in RESUMABLE
  ]
  if differ:
    raise ValueError(
      'the checkpoint in this workdir was made with another config; use '
      'another --workdir, or undo: ' + '; '.join(differ)
    )


def to_json(flat: Mapping[str, Any]) -> str:
  """The flat config as indented JSON text."""
  return json.dumps(dict(flat), indent=2) + '\n'
