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
    step: optimizer steps taken, int32.
    params: trained parameters, float32.
    batch_stats: running means and variances of BatchNorm.
    codebook: the collection 'codebook'.
    opt_state: the optimizer's state.
    averages: moving averages of params and batch_stats for evaluation, or None.
      Averaged parameters need averaged statistics.
    nonfinite_streak: steps skipped in a row because they were not finite,
      int32.
    discriminator: its params and opt_state, and LeCAM's averages logits_real
      and logits_fake; None without an adversarial loss.
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
    return {
      'params': self.params,
      'batch_stats': self.batch_stats,
      'codebook': self.codebook,
    }

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The model's collections, averaged where there are averages."""
    return self.variables | (self.averages or {})


def create_state(
  model,
  optimizer,
  key: jax.Array,
  *,
  image_size: int,
  batch_size: int,
  params_ema: bool = False,
  discriminator: dict[str, Any] | None = None,
  variables: dict[str, Any] | None = None,
) -> TrainState:
  """The state before the first step.

  Call under `jax.jit`: every leaf gets its own buffer, which donation needs,
  and the forward pass, whose result nothing uses, is not computed.

  Args:
    model: a `VQVAE`.
    optimizer: an optax transformation, from `make_optimizer`.
    key: random key of the initial parameters.
    image_size: side of the training images in pixels.
    batch_size: images of a forward pass over all devices; codes of
      `init_from='normal'` start with the count that they expect in it.
    params_ema: keep moving averages of the parameters and batch statistics.
    discriminator: from `Objective.init_discriminator`.
    variables: the model's collections; None: random ones.
  """
  shape = (batch_size, image_size, image_size, 3)
  if variables is None:
    variables = model.init(key, jnp.zeros(shape, jnp.float32), train=True)
  else:
    variables = jax.tree.map(jnp.copy, variables)  # to donate
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  averaged = {'params': params, 'batch_stats': batch_stats}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    codebook=variables.get('codebook', {}),
    opt_state=optimizer.init(params),
    averages=jax.tree.map(jnp.copy, averaged) if params_ema else None,
    nonfinite_streak=jnp.zeros((), jnp.int32),
    discriminator=discriminator,
  )


def parameter_table(params) -> str:
  """A line for each kind of block: its name, how many, their parameters."""
  sizes = collections.defaultdict(list)
  for module, blocks in sorted(params.items()):
    for block, values in blocks.items():
      name = f'{module}/{block.rstrip("0123456789")}'
      sizes[name].append(sum(x.size for x in jax.tree.leaves(values)))
  lines = [f'{sum(map(sum, sizes.values())):,} parameters']
  for name, blocks in sizes.items():
    label = name if len(blocks) == 1 else f'{name} x {len(blocks)}'
    lines.append(f'  {label:<24}{sum(blocks):>12,}')
  return '\n'.join(lines)
