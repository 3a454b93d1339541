"""The state that a run carries from step to step."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

FAST_COMPILE = {'xla_backend_optimization_level': 1}
"""For a program that runs once: compiles in a third of the time, to the same
bits on CPU (docs/scale.md)."""

PARTS = 'encoder', 'codes', 'quantizer', 'decoder'
"""The parts of a `VQVAE` that may stand still by themselves."""


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

  def with_settled(self, idle) -> 'TrainState':
    """The `idle` parts take their averages, which are what is evaluated.

    The decoder then learns from the codes that it will be given, and the
    average of what does not change does not move.
    """

    def pick(path, x, average):
      return average if part_of(path) in idle else x

    settled = {
      name: jax.tree_util.tree_map_with_path(pick, getattr(self, name), tree)
      for name, tree in (self.averages or {}).items()
    }
    return self.replace(**settled)

  def next_averages(self, new, decay: float):
    """The averages, if any, after a step from this state that gave `new`.

    After t steps their decay is min(decay, (1 + t)/(10 + t)), so that the first
    parameters do not linger.
    """
    decay = jnp.minimum(decay, (1 + self.step) / (10 + self.step))
    # In this form, the average of a constant stays that constant.
    return self.averages and jax.tree.map(
      lambda a, x: a + (1 - decay) * (x - a), self.averages, new
    )


def part_of(path) -> str:
  """Which of `PARTS` of a `VQVAE` a parameter or a statistic belongs to.

  'codes' are learned codes (`embedding`; the `map` of SimVQ) and the phi of
  multi-scale ones; 'quantizer' is all else in the quantizer.
  """
  first, *names = (key.key for key in path)
  if first != 'vq':
    return 'encoder' if first == 'encoder' else 'decoder'
  codes = 'embedding', 'map', 'phi_'
  return 'codes' if any(n.startswith(codes) for n in names) else 'quantizer'


def idle_parts(freeze: str, *, quantize: bool = True) -> tuple[str, ...]:
  """The parts of a `VQVAE` that a step leaves as they are.

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

  There every leaf gets its own buffer, which donation needs, and the forward
  pass, whose result nothing uses, is not computed. step is a `TrainStep`, and
  variables are the model's collections; what they lack, the quantizer or all,
  is random. Codes of `init_from='normal'` start with the count that they expect
  in a microbatch.
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
