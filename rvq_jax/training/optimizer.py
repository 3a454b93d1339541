"""AdamW with cosine annealing (paper 4.1)."""

import jax
import jax.numpy as jnp
import optax

from rvq_jax.training.state import PARTS, part_of


def make_schedule(
  learning_rate: float,
  *,
  num_steps: int,
  warmup_steps: int = 0,
  schedule: str = 'cosine',
) -> optax.Schedule:
  """Step -> learning rate: linear warm-up from 0, then cosine to 0 or constant.

  num_steps: steps of the run; ValueError if the warm-up takes them all.
  """
  if warmup_steps >= num_steps and warmup_steps > 0:
    raise ValueError(
      f'warmup_steps: expected less than the {num_steps} steps of the run, '
      f'got {warmup_steps}'
    )
  main = optax.constant_schedule(learning_rate)
  if schedule == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
  if not warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, main], [warmup_steps])


def decay_mask(params):
  """True for kernels: only they decay, not BatchNorm, biases or codes."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


def make_optimizer(
  schedule: optax.Schedule,
  *,
  weight_decay: float = 0.01,
  clip_norm: float = 0.0,
  b2: float = 0.999,
) -> optax.GradientTransformationExtraArgs:
  """AdamW (beta 0.9, b2) with decoupled decay of the kernels only.

  `update(grads, state, params, step=, idle=())` needs the step for the
  schedule, which also counts skipped steps. An `idle` part (see
  `state.idle_parts`) keeps its parameters and moments and counts no step, so
  that its moments, and their debiasing, start with its gradients. The state has
  the same arrays for any `idle`: a run may resume with another `freeze`.
  clip_norm bounds the global gradient norm; 0 does not clip.
  """
  return optax.chain(
    _drop_idle(),  # idle parts do not count towards the clipped norm
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    _scale_by_adam(b2),
    optax.add_decayed_weights(weight_decay, decay_mask),
    _scale_by_rate(schedule),
    _drop_idle(),  # weight decay does not move them
  )


def _drop_idle():
  def update(updates, state, params=None, *, idle=(), **_):
    del params

    def drop(path, x):
      return jnp.zeros_like(x) if part_of(path) in idle else x

    return jax.tree_util.tree_map_with_path(drop, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scale_by_adam(b2):
  """As in optax, but with a count of steps per part."""
  adam = optax.scale_by_adam(b2=b2)

  def init(params):
    zeros = {part: jnp.zeros((), jnp.int32) for part in PARTS}
    return adam.init(params)._replace(count=zeros)

  def take(part, tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x if part_of(path) == part else None, tree
    )

  def put(old, new):
    return jax.tree.map(lambda x, y: x if y is None else y, old, new)

  def update(grads, state, params=None, *, idle=(), **_):
    del params
    count, *trees = dict(state.count), grads, state.mu, state.nu
    for part in PARTS:
      if part not in idle:
        grad, *moments = (take(part, tree) for tree in trees)
        old = optax.ScaleByAdamState(count[part], *moments)
        grad, (count[part], *moments) = adam.update(grad, old)
        trees = list(map(put, trees, (grad, *moments)))
    grads, mu, nu = trees
    return grads, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_rate(schedule):
  def update(updates, state, params=None, *, step, **_):
    del params
    rate = -schedule(step)
    return jax.tree.map(lambda x: rate * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
