"""A new run that starts from a trained model."""

import logging
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from rvq_jax.quantize.codebook import COUNTS
from rvq_jax.training.state import TrainState

# They change the output with arrays of the same shapes.
_SAME_SHAPES = (
  *('model.activation', 'model.cosine', 'model.inner_product'),
  'model.resize',
)
_SHOWN = 12


def collections(
  model, template: TrainState, flat, *, scale: float
) -> dict[str, Any]:
  """params, batch_stats and codebook of a trained model, on the host.

  Args:
    model: a `Tokenizer`; ValueError if its fields or arrays differ.
    template: shapes of the state of the run.
    flat: the checked config of the run.
    scale: of the codes' counts and sums: vectors per update in this run over
      the number in the model's. A larger batch would make all codes look dead.
  """
  ours, theirs = (
    {n: x.shape for n, x in flatten_dict(tree, sep='.').items()}
    for tree in (template.variables, model.variables)
  )
  arrays = _differences(ours, theirs, ours | theirs)
  names = [name for name in flat if name.startswith('model.')]
  fields = _differences(flat, model.config, names)
  if arrays or any(line.startswith(_SAME_SHAPES) for line in fields):
    lines = [f'config.{line}' for line in fields] + arrays[:_SHOWN]
    if len(arrays) > _SHOWN:
      lines.append(f'and {len(arrays) - _SHOWN} more')
    raise ValueError(
      '--init: the model is another one than config.model describes: '
      + '; '.join(lines)
    )

  def scaled(path, x):
    return x * x.dtype.type(scale) if path[-1].key in COUNTS else x

  variables = jax.device_get(dict(model.variables))
  logging.info(
    'starts from step %d of the model %.16s', model.step, model.model_hash
  )
  codebook = jax.tree_util.tree_map_with_path(scaled, variables['codebook'])
  return variables | {'codebook': codebook}


def _differences(ours, theirs, names):
  return [
    f'{name}: expected {ours.get(name)!r}, got {theirs.get(name)!r}'
    for name in names
    if ours.get(name) != theirs.get(name)
  ]
