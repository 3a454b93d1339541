"""AdamW with cosine annealing (paper 4.1)."""

import functools

import jax
import optax


def make_schedule(
  learning_rate: float,
  *,
  num_steps: int,
  warmup_steps: int = 0,
  schedule: str = 'cosine',
) -> optax.Schedule:
  """Step -> learning rate: linear warm-up from 0, then cosine to 0 or constant.

  num_steps are the steps of the run; ValueError if the warm-up takes them all.
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
  """True for the kernels, which decay; BatchNorm, biases and codes do not."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


def freeze_mask(params, freeze: str):
  """True for the parameters of a `VQVAE` that stay as they are.

  freeze is '': none; 'codes': learned codes (`embedding`; the `map` of SimVQ)
  and the phi of multi-scale ones; or 'encoder,codes': the encoder and the whole
  quantizer, so that an image keeps its ids.
  """

  def is_frozen(path, _):
    names = [key.key for key in path]
    if 'encoder' in freeze:
      return names[0] in ('encoder', 'vq')
    codes = 'embedding', 'map', 'phi_'
    return freeze == 'codes' and any(name.startswith(codes) for name in names)

  return jax.tree_util.tree_map_with_path(is_frozen, params)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  weight_decay: float = 0.01,
  clip_norm: float = 0.0,
  b2: float = 0.999,
  freeze: str = '',
) -> optax.GradientTransformationExtraArgs:
  """AdamW (beta 0.9, b2) with decoupled decay of the kernels only.

  `update(grads, state, params, step=)` takes the step of the schedule: it
  counts skipped steps too, which the optimizer does not see. The state has the
  same arrays for every `freeze` (see `freeze_mask`), so that a run may resume
  with another one. clip_norm bounds the global gradient norm; 0 does not clip.
  """
  freeze_frozen = optax.masked(
    optax.set_to_zero(), functools.partial(freeze_mask, freeze=freeze)
  )
  return optax.chain(
    freeze_frozen,  # they do not count towards the clipped norm
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.scale_by_adam(b2=b2),
    optax.add_decayed_weights(weight_decay, decay_mask),
    _scale_by_rate(schedule),
    freeze_frozen,  # momentum and weight decay do not move them
  )


def _scale_by_rate(schedule):
  def update(updates, state, params=None, *, step):
    del params
    rate = -schedule(step)
    return jax.tree.map(lambda x: rate * x, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
