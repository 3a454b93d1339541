"""The train step and the evaluation step: pure functions of state and batch.

The same functions run under `jit` with shardings (no axis name: the batch is
global), and under `pmap` and `shard_map` (axis_name given to the step and to
the model: each device holds its share of the batch).
"""

import jax
import jax.numpy as jnp
import optax

from rvq_jax.data.images import prepare_images, random_flip
from rvq_jax.training.accumulate import Pass, accumulate
from rvq_jax.training.state import TrainState

MAX_NONFINITE_STREAK = 10
"""Steps in a row that are not finite after which no further step is taken."""


def _mean(tree, axis_name):
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _all_finite(tree):
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


# THE TRAIN STEP
def make_train_step(
  model,
  optimizer: optax.GradientTransformation,
  *,
  seed: int = 0,
  flip: bool = True,
  params_ema_decay: float = 0.0,
  accumulate_steps: int = 1,
  axis_name=None,
):
  """Builds `train_step(state, batch) -> (state, metrics)`.

  One step minimises MSE(reconstruction, image) on [-1, 1] plus the quantizer's
  loss (paper eq. 5). Randomness depends on (seed, step) and on an image's place
  in the global batch alone, so any number of devices takes the same step. A
  step whose loss, gradient, new statistics or new codebook are not finite
  leaves the whole state as it was, to the bit, except for `step` and
  `nonfinite_streak`. After ten of them in a row so does every step, however
  late the host looks at the streak.

  Args:
    model: a `VQVAE`, made with the same axis_name.
    optimizer: from `make_optimizer`.
    seed: of flips and of the replacement of codes.
    flip: mirror each image with probability 1/2.
    params_ema_decay: of the averaged parameters, where the state has them.
    accumulate_steps: microbatches that a batch is passed through the model in;
      see `accumulate`.
    axis_name: mapped axis under `pmap` or `shard_map`; None under `jit`.

  Returns:
    A function of a `TrainState` and {'image': [B, h, w, 3] uint8, or float in
    [-1, 1]} that returns the next state and metrics: float32 scalars of the
    global batch, and 'counts' [K].
  """

  def run(params, variables, images, key, mutable) -> Pass:
    images = prepare_images(images)

    def loss_fn(params):
      out, updates = model.apply(
        variables | {'params': params},
        images,
        train=True,
        mutable=list(mutable),
        rngs={'codebook': key},
      )
      error = jnp.mean((out.reconstruction - images) ** 2)
      # The mean over devices is taken of the loss, not of the gradient alone:
      # under shard_map the gradient of a replicated parameter is a sum.
      loss = _mean(error + out.quantizer.loss, axis_name)
      return loss, (error, out.quantizer, updates)

    (loss, (error, quantizer, updates)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(params)
    scalars = quantizer.metrics | {'mse': error}
    return Pass(loss, grads, scalars, quantizer.counts, updates)

  def train_step(state: TrainState, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    flip_key, codebook_key = jax.random.split(key)
    images = batch['image']
    if flip:
      images = random_flip(flip_key, images, axis_name=axis_name)
    if accumulate_steps == 1:
      mutable = ('batch_stats', 'codebook')
      done = run(state.params, state.variables, images, codebook_key, mutable)
    else:
      done = accumulate(
        run,
        state.params,
        state.variables,
        images,
        codebook_key,
        steps=accumulate_steps,
      )
    loss, grads, scalars, counts, updates = done
    grads = _mean(grads, axis_name)
    grad_norm = optax.tree.norm(grads)
    steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, steps)
    params_ema = state.params_ema
    if params_ema is not None:
      params_ema = optax.incremental_update(
        params, params_ema, 1 - params_ema_decay
      )
    proposed = state.replace(
      params=params,
      batch_stats=updates.get('batch_stats', {}),
      codebook=updates.get('codebook', {}),
      opt_state=opt_state,
      params_ema=params_ema,
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    # A variance that overflows divides to zero: loss and gradient stay finite.
    finite &= _all_finite((proposed.batch_stats, proposed.codebook))
    finite &= state.nonfinite_streak < MAX_NONFINITE_STREAK
    kept = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), proposed, state
    )
    streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
    kept = kept.replace(step=state.step + 1, nonfinite_streak=streak)
    scalars = _mean(scalars, axis_name) | {
      'loss': loss,
      'grad_norm': grad_norm,
      'skipped': 1.0 - finite.astype(jnp.float32),
      'counts': counts,
    }
    return kept, scalars

  return train_step
