"""A new run that starts from a trained model."""

import logging
from collections.abc import Mapping
from typing import Any

import flax
import jax

from rvq_jax.quantize.codebook import COUNTS
from rvq_jax.training.state import TrainState

# They change the output with arrays of the same shapes.
_SAME_SHAPES = ('model.activation', 'model.cosine')
_SHOWN = 12


def collections(
  model, template: TrainState, flat: Mapping[str, Any], *, scale: float
) -> dict[str, Any]:
  """The collections of a trained model, on the host, for a new run.

  Args:
    model: it has `variables`, the collections, and `config`, the flat config
      that it was trained with, as a `Tokenizer` has.
    template: shapes of the state of the run.
    flat: the checked config of the run.
    scale: of the codes' `cluster_size` and `embedding_sum`: the vectors per
      update of this run over those that the model had; otherwise a larger batch
      would make every code look dead.

  Returns:
    params, batch_stats and codebook.

  Raises:
    ValueError: the model differs, in one line that lists fields and arrays.
  """
  _check_same(model, template, flat)

  def scaled(path, x):
    return x * x.dtype.type(scale) if path[-1].key in COUNTS else x

  variables = jax.device_get(dict(model.variables))
  variables['codebook'] = jax.tree_util.tree_map_with_path(
    scaled, variables['codebook']
  )
  logging.info(
    'starts from step %d of the model %.16s', model.step, model.model_hash
  )
  return variables


def _check_same(model, template, flat):
  def shapes(tree):
    arrays = flax.traverse_util.flatten_dict(tree, sep='.')
    return {name: tuple(x.shape) for name, x in arrays.items()}

  ours, theirs = shapes(template.variables), shapes(model.variables)
  arrays = _differences(ours, theirs, dict.fromkeys([*ours, *theirs]))
  fields = _differences(flat, model.config, _SAME_SHAPES)
  if not arrays and not fields:
    return
  shaping = (name for name in flat if name.startswith('model.'))
  fields = _differences(flat, model.config, shaping)
  more = f'; and {len(arrays) - _SHOWN} more' if len(arrays) > _SHOWN else ''
  raise ValueError(
    '--init: the model is another one than config.model describes: '
    + '; '.join([f'config.{line}' for line in fields] + arrays[:_SHOWN])
    + more
  )


def _differences(ours, theirs, names):
  return [
    f'{name}: expected {ours.get(name)!r}, got {theirs.get(name)!r}'
    for name in names
    if ours.get(name) != theirs.get(name)
  ]
