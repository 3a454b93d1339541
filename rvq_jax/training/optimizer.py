"""AdamW with cosine annealing (paper 4.1)."""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('cosine', 'constant')


def make_schedule(
  learning_rate: float,
  *,
  num_steps: int,
  warmup_steps: int = 0,
  schedule: str = 'cosine',
) -> optax.Schedule:
  """Step -> learning rate: linear warm-up, then cosine to 0 or constant.

  Args:
    learning_rate: its highest value.
    num_steps: steps of the run, warm-up included.
    warmup_steps: steps of linear warm-up from 0.
    schedule: 'cosine' or 'constant'.

  Raises:
    ValueError: the schedule is unknown, or the warm-up longer than the run.
  """
  if schedule not in SCHEDULES:
    raise ValueError(
      f'schedule: expected one of {", ".join(SCHEDULES)}; got {schedule!r}'
    )
  if warmup_steps >= num_steps and warmup_steps > 0:
    raise ValueError(
      f'warmup_steps: expected less than the {num_steps} steps of the run, '
      f'got {warmup_steps}'
    )
  if schedule == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
  else:
    main = optax.constant_schedule(learning_rate)
  if not warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, main], [warmup_steps])


def decay_mask(params):
  """True for the kernels, which decay; BatchNorm, biases and codes do not."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


def is_frozen(path, freeze: str) -> bool:
  """Whether a parameter stays as it is.

  Args:
    path: its keys, as of `jax.tree_util.tree_map_with_path`.
    freeze: 'codes': learned codes (`embedding`; the `map` of SimVQ) and the phi
      of multi-scale ones;
      'encoder,codes': the encoder and the whole quantizer, so that an image
      keeps its ids; '': none.
  """
  names = [key.key for key in path]
  if 'encoder' in freeze:
    return names[0] in ('encoder', 'vq')
  codes = 'embedding', 'map', 'phi_'
  return freeze == 'codes' and any(name.startswith(codes) for name in names)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  weight_decay: float = 0.01,
  clip_norm: float = 0.0,
  b2: float = 0.999,
  freeze: str = '',
  quantizer_scale: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW (beta 0.9, b2) with decay on kernels only.

  Args:
    schedule: step -> learning rate.
    weight_decay: decoupled weight decay.
    clip_norm: upper bound of the global gradient norm; 0 does not clip.
    b2: decay of the second moment.
    freeze: parameters that stay as they are, see `is_frozen`. A gradient of 0
      does not ensure that: there are momentum and weight decay.
    quantizer_scale: learning rate of the quantizer's parameters (those under
      'vq'), as a multiple of that of all others.
  """
  adamw = optax.adamw(
    schedule, b2=b2, weight_decay=weight_decay, mask=decay_mask
  )
  if clip_norm > 0:
    adamw = optax.chain(optax.clip_by_global_norm(clip_norm), adamw)

  def factor(path):
    if is_frozen(path, freeze):
      return 0.0
    return quantizer_scale if path[0].key == 'vq' else 1.0

  def update(grads, state, params=None):
    # Nor do the gradients of what is frozen count in the norm that is clipped.
    grads = jax.tree_util.tree_map_with_path(
      lambda path, g: jnp.zeros_like(g) if is_frozen(path, freeze) else g, grads
    )
    updates, state = adamw.update(grads, state, params)
    updates = jax.tree_util.tree_map_with_path(
      lambda path, x: x * factor(path) if factor(path) != 1 else x, updates
    )
    return updates, state

  return optax.GradientTransformation(adamw.init, update)


def set_step(opt_state, step: jax.Array):
  """opt_state with its schedule at `step`, which counts skipped steps too."""
  is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(
    lambda x: x._replace(count=step) if is_schedule(x) else x,
    opt_state,
    is_leaf=is_schedule,
  )
