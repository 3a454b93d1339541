"""Starts a new run from a trained model."""

import logging
import shlex
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from rvq_jax.quantize.codebook import COUNTS
from rvq_jax.quantize.fields import fields_of
from rvq_jax.training.state import TrainState

# Fields that change the output but no shape of an array.
_SAME_SHAPES = {
  *('model.activation', 'model.unit_range'),
  *('model.cosine', 'model.inner_product', 'model.resize'),
}
# Fields that make another quantizer; its other fields say how it trains.
_QUANTIZER = {
  *('model.quantizer', 'model.codebook_size', 'model.ema', 'model.cosine'),
  *('model.inner_product', 'model.depth', 'model.heads'),
  *('model.sides', 'model.resize'),
}
_SHOWN = 4


def collections(
  model, template: TrainState, flat, *, scale: float, swap: bool
) -> dict[str, Any]:
  """params, batch_stats and codebook of a trained model, on the host.

  Args:
    model: a `Tokenizer`; if its fields or arrays differ, a ValueError lists the
      flags to type.
    template: shapes of the state of the run.
    flat: the checked config of the run.
    scale: factor of the codes' counts and sums: vectors per update, this run's
      over the model's. A larger batch would else make all codes look dead.
    swap: the quantizer may be another one; then the result leaves it out.
  """
  ours, theirs = (
    {n: x.shape for n, x in flatten_dict(tree, sep='.').items()}
    for tree in (template.variables, model.variables)
  )
  arrays = _differing(ours, theirs, ours | theirs)
  config = model.config | {'model.sides': model.sides}
  coders = {'model.network'} | _fields(model.model.encoder, model.model.decoder)
  codes = {'model.quantizer'} | (_fields(model.model.vq) & _QUANTIZER)
  names = _differing(flat, config, sorted(coders | codes))
  variables = jax.device_get(dict(model.variables))
  fixed = [n for n in names if n in coders]  # for any quantizer
  fixed_arrays = [n for n in arrays if n.split('.')[1] != 'vq']
  new = swap and (names, arrays) != (fixed, fixed_arrays)
  if new:
    names, arrays = fixed, fixed_arrays
    for name, tree in variables.items():
      variables[name] = {part: x for part, x in tree.items() if part != 'vq'}
  if arrays or _SAME_SHAPES.intersection(names):
    text = _refusal(ours, theirs, config, names, arrays)
    if not (fixed_arrays or _SAME_SHAPES.intersection(fixed)):
      text += ', or --config.freeze=encoder to train a new quantizer'
    raise ValueError(text)
  logging.info(
    'starts from step %d of the model %.16s%s',
    *(model.step, model.model_hash, ', with a new quantizer' if new else ''),
  )

  def scaled(path, x):
    return x * x.dtype.type(scale) if path[-1].key in COUNTS else x

  codebook = jax.tree_util.tree_map_with_path(scaled, variables['codebook'])
  return variables | {'codebook': codebook}


def _fields(*modules):
  names = {f'model.{name}' for x in modules for name in fields_of(type(x))}
  return names - {'model.remat'}


def _differing(ours, theirs, names):
  return [n for n in names if _of(ours, n) != _of(theirs, n)]


def _of(fields, name):
  """A field; JSON has no tuples."""
  value = fields.get(name)
  return tuple(value) if isinstance(value, list) else value


def _refusal(ours, theirs, config, names, arrays):
  flags = [f'--config.{name}={_of(config, name)}' for name in names]
  what = f'type {shlex.join(flags)}' if flags else 'all fields are equal'
  lines = [
    f'{name}: expected {ours.get(name)}, got {theirs.get(name)}'
    for name in arrays[:_SHOWN]
  ]
  if len(arrays) > _SHOWN:
    lines.append(f'and {len(arrays) - _SHOWN} more')
  text = '--init: the model is not the one that config.model describes'
  return '; '.join([text, *lines, what])
