"""The state that a run carries from step to step."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

FAST_COMPILE = {'xla_backend_optimization_level': 1}
"""For a program that runs once: compiles in a third of the time, to the same
bits on CPU (docs/scale.md)."""


@flax.struct.dataclass
class TrainState:
  """The whole state of a run; every leaf is an array.

  Attributes:
    step: steps taken, int32.
    params: trained parameters, float32.
    batch_stats: running means and variances of BatchNorm.
    codebook: the collection 'codebook'.
    opt_state: the optimizer's state.
    averages: moving averages of params and batch_stats for evaluation, or None.
      Averaged parameters need averaged statistics.
    nonfinite_streak: steps skipped in a row as not finite, int32.
    discriminator: from `Objective.init_discriminator`, or None.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  codebook: Any
  opt_state: Any
  averages: dict[str, Any] | None
  nonfinite_streak: jax.Array
  discriminator: dict[str, Any] | None = None

  @property
  def variables(self) -> dict[str, Any]:
    """The model's collections as they are trained."""
    averaged = {'params': self.params, 'batch_stats': self.batch_stats}
    return averaged | {'codebook': self.codebook}

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The model's collections, averaged where there are averages."""
    return self.variables | (self.averages or {})


def create_state(
  step, key: jax.Array, image_size: int, batch_size: int, variables=None
) -> TrainState:
  """The state before the first step; call it under `jax.jit`.

  There every leaf gets its own buffer, which donation needs, and the forward
  pass, whose result nothing uses, is not computed. step is a `TrainStep`, and
  variables are the model's collections, by default random ones. Codes of
  `init_from='normal'` start with the count that they expect in a microbatch.
  """
  if variables is None:
    count = batch_size // step.accumulate_steps
    images = jnp.zeros((count, image_size, image_size, 3))
    variables = step.model.init(key, images, train=True)
  else:
    variables = jax.tree.map(jnp.copy, variables)  # to donate
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  averages = {'params': params, 'batch_stats': batch_stats}
  key = jax.random.fold_in(key, 1)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    codebook=variables.get('codebook', {}),
    opt_state=step.optimizer.init(params),
    averages=jax.tree.map(jnp.copy, averages)
    if step.params_ema_decay
    else None,
    nonfinite_streak=jnp.zeros((), jnp.int32),
    discriminator=step.objective.init_discriminator(key, image_size),
  )


def parameter_table(params) -> str:
  """A line for each kind of block: its name, how many, their parameters."""
  sizes = collections.defaultdict(list)
  for module, blocks in sorted(params.items()):
    for block, values in blocks.items():
      name = f'{module}/{block.rstrip("0123456789")}'
      sizes[name].append(sum(x.size for x in jax.tree.leaves(values)))
  text = f'{sum(map(sum, sizes.values())):,} parameters'
  for name, blocks in sizes.items():
    label = name if len(blocks) == 1 else f'{name} x {len(blocks)}'
    text += f'\n  {label:<24}{sum(blocks):>12,}'
  return text
