"""The state of a run between steps."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

FAST_COMPILE = {'xla_backend_optimization_level': 1}
"""For a program that runs once: compiles in a third of the time, to the same
bits on CPU (docs/scale.md)."""

PARTS = 'encoder', 'codes', 'quantizer', 'decoder'
"""The parts of a `VQVAE` that can be idle separately."""


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
    nonfinite_streak: skipped steps in a row, int32.
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
    """The model's collections in training."""
    averaged = {'params': self.params, 'batch_stats': self.batch_stats}
    return averaged | {'codebook': self.codebook}

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The model's collections for evaluation: the averages, if any."""
    return self.variables | (self.averages or {})

  def with_settled(self, idle) -> 'TrainState':
    """Sets the `idle` parts to their averages, which evaluation uses.

    The decoder then learns from the codes of evaluation, and the averages of
    idle parts do not move.
    """

    def pick(path, x, average):
      return average if part_of(path) in idle else x

    settled = {
      name: jax.tree_util.tree_map_with_path(pick, getattr(self, name), tree)
      for name, tree in (self.averages or {}).items()
    }
    return self.replace(**settled)

  def next_averages(self, new, decay: float):
    """The averages, if any, after a step from this state to `new`.

    After t steps their decay is min(decay, (1 + t)/(10 + t)), so that the first
    parameters lose their weight soon.
    """
    decay = jnp.minimum(decay, (1 + self.step) / (10 + self.step))
    # This form keeps the average of a constant bit-exact.
    return self.averages and jax.tree.map(
      lambda a, x: a + (1 - decay) * (x - a), self.averages, new
    )


def part_of(path) -> str:
  """The one of `PARTS` that holds a parameter or a statistic.

  'codes' are learned codes (`embedding`; SimVQ's `map`) and the multi-scale
  phi; 'quantizer' is the rest of the quantizer.
  """
  first, *names = (key.key for key in path)
  if first != 'vq':
    return 'encoder' if first == 'encoder' else 'decoder'
  codes = 'embedding', 'map', 'phi_'
  return 'codes' if any(n.startswith(codes) for n in names) else 'quantizer'


def idle_parts(freeze: str, *, quantize: bool = True) -> tuple[str, ...]:
  """The parts of a `VQVAE` that a step does not change.

  freeze is '': none; 'codes'; 'encoder'; or 'encoder,codes': the encoder and
  the whole quantizer, so that an image keeps its ids. A step that does not
  quantize has no gradient for the quantizer.
  """
  idle = set(freeze.split(','))
  if idle >= {'encoder', 'codes'} or not quantize:
    idle |= {'codes', 'quantizer'}
  return tuple(part for part in PARTS if part in idle)


def create_state(
  step, key: jax.Array, image_size: int, batch_size: int, variables=None
) -> TrainState:
  """The state before the first step; call it under `jax.jit`.

  Under `jit` every leaf gets its own buffer, as donation needs, and XLA skips
  the unused forward pass. step is a `TrainStep`; variables are the model's
  collections. Missing parts, the quantizer or all, are random. Codes of
  `init_from='normal'` start with their expected count in a microbatch.
  """
  count = batch_size // step.accumulate_steps
  images = jnp.zeros((count, image_size, image_size, 3))
  given = jax.tree.map(jnp.copy, variables or {})  # to donate
  variables = {
    name: tree | given.get(name, {})
    for name, tree in step.model.init(key, images, train=True).items()
  }
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
  """A line per kind of block: its name, its number, its parameters."""
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
