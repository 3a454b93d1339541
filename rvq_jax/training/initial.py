"""A new run that starts from a trained model."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import COUNTS
from rvq_jax.training.state import TrainState

# What a model computes from arrays of the same shapes, and what shapes them.
_DECIDING = ('model.activation', 'model.cosine')
_SHAPING = (
  *('model.widths', 'model.factor', 'model.num_res_blocks', 'model.num_heads'),
  *('model.code_dim', 'model.norm', 'model.quantizer', 'model.codebook_size'),
  *('model.ema', 'model.depth', 'model.heads', 'model.sides'),
)
_SHOWN = 12


def collections(
  init: Callable[[], Any] | None,
  template: TrainState,
  config: Mapping[str, Any],
) -> dict[str, Any] | None:
  """What a new run takes from a trained model, on the host.

  The counts of the codes (`cluster_size` and `embedding_sum`) are scaled to the
  vectors of the run's batch: were they those of a smaller batch, every code
  would count as dead.

  Args:
    init: gives the model: it has `variables`, the collections, and `config`,
      the flat config that it was trained with, as a `Tokenizer` has.
    template: shapes of the state of the run.
    config: the checked flat config of the run.

  Returns:
    params, batch_stats and codebook; None without `init`.

  Raises:
    ValueError: the model differs, in one line that lists fields and arrays; the
      codes would wait for `quantize_after`, to be overtaken by the encoder; or
      a new encoder would be frozen.
  """
  if init is None:
    if 'encoder' in config['freeze']:
      raise ValueError(
        'config.freeze: expected a trained encoder, from --init or a '
        f'checkpoint, with {config["freeze"]!r}, got a new run'
      )
    return None
  if config['model.quantize_after']:
    raise ValueError(
      '--init: expected config.model.quantize_after = 0, for the codes are '
      f'there from the start, got {config["model.quantize_after"]}'
    )
  model = init()
  _check_same(model, template, config)
  scale = _vectors(config) / _vectors(model.config)

  def scaled(path, x):
    counted = path[-1].key in COUNTS
    return x * x.dtype.type(scale) if counted else x

  variables = jax.device_get(dict(model.variables))
  variables['codebook'] = jax.tree_util.tree_map_with_path(
    scaled, variables['codebook']
  )
  logging.info(
    'starts from step %d of the model %.16s', model.step, model.model_hash
  )
  return variables


def start_from(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
  """A new run's state with the collections `variables`; call under `jax.jit`.

  Step, optimizer and discriminator stay new.
  """
  copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731 - to donate
  averages = {name: variables[name] for name in state.averages or ()}
  return state.replace(
    **{name: copy(variables[name]) for name in state.variables},
    averages=copy(averages) or None,
  )


def _vectors(config):
  """Vectors per codebook update: microbatch size times positions."""
  side = config['data.image_size'] // config['model.factor']
  return config['batch_size'] / config['accumulate_steps'] * side**2


def _check_same(model, template, config):
  def shapes(tree):
    flat = flax.traverse_util.flatten_dict(tree, sep='.')
    return {name: tuple(x.shape) for name, x in flat.items()}

  ours, theirs = shapes(template.variables), shapes(model.variables)
  arrays = _differences(ours, theirs, dict.fromkeys([*ours, *theirs]))
  fields = _differences(config, model.config, _DECIDING)
  if not arrays and not fields:
    return
  fields += _differences(config, model.config, _SHAPING)
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
