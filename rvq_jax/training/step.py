"""The train step: a pure function of state and batch.

The same function runs under `jit` with shardings (no axis name: the batch is
global), and under `pmap` and `shard_map` (axis_name given to the step and to
the model: each device holds its share of the batch).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rvq_jax.data.images import prepare_images, random_colors, random_flip
from rvq_jax.metrics import diversity
from rvq_jax.training.objective import MSE, Objective
from rvq_jax.training.optimizer import set_step
from rvq_jax.training.state import TrainState

MAX_NONFINITE_STREAK = 10
"""Steps in a row that are not finite after which no further step is taken."""


class Pass(NamedTuple):
  """What a forward and backward pass over a batch gives."""

  loss: jax.Array  # float32 scalar of the global batch
  grads: tuple[Any, Any]  # of the parameters, and of D's parameters or None
  metrics: dict[str, jax.Array]  # float32 scalars of this device's batch
  counts: jax.Array | None  # of codes in the global batch, [K] or [L, K]
  updates: dict[str, Any]  # batch_stats and codebook after the pass


def make_train_step(
  model,
  optimizer: optax.GradientTransformation,
  *,
  seed: int = 0,
  flip: bool = True,
  colors: bool = False,
  params_ema_decay: float = 0.0,
  accumulate_steps: int = 1,
  quantize: bool = True,
  objective: Objective = MSE,
  adversarial: bool = False,
  axis_name=None,
):
  """Builds `train_step(state, batch, lpips_weights=None)`.

  One step minimises the objective, by default MSE(reconstruction, image) on
  [-1, 1], plus the quantizer's loss (paper eq. 5). Randomness depends on
  (seed, step) and on an image's index in the global batch alone, so any number
  of devices takes the same step. If the loss, the gradient, the new statistics,
  the new codebook or the new discriminator are not finite, the whole state
  stays as it was but for `step`, which the schedule of the learning rate
  follows, and `nonfinite_streak`; after ten such steps in a row so it does in
  every step.

  Args:
    model: a `VQVAE`, made with the same axis_name.
    optimizer: from `make_optimizer`.
    seed: of flips and of the replacement of codes.
    flip: mirror each image with probability 1/2.
    colors: give each image other colours, see `random_colors`.
    params_ema_decay: of the state's averages, where it has them.
    accumulate_steps: microbatches per step; see `_accumulate`.
    quantize: False: the latents pass on unchanged, and the codebook with its
      losses and metrics stays out of the step ("Continuous First, Discrete
      Later", arXiv:2605.06870).
    objective: the losses other than the quantizer's.
    adversarial: the state's discriminator judges the reconstructions, and is
      then updated by the same images and reconstructions.
    axis_name: mapped axis under `pmap` or `shard_map`; None under `jit`.

  Returns:
    A function of a `TrainState`, {'image': [B, h, w, 3] uint8, or float in
    [-1, 1]} and, with a perceptual loss, the weights of LPIPS that returns the
    next state and metrics: float32 scalars of the global batch, and 'counts'
    [K] (None without quantization).
  """

  def train_step(state: TrainState, batch, lpips_weights=None):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    flip_key, codebook_key = jax.random.split(key)
    images = _augment(flip_key, batch['image'], flip, colors, axis_name)
    judge = state.discriminator if adversarial else None
    run_pass = _forward_backward(
      model, state, judge, objective, lpips_weights, axis_name, quantize
    )
    if accumulate_steps > 1:
      run_pass = _accumulate(run_pass, judge, accumulate_steps)
    result = run_pass(state.variables, images, codebook_key)

    grads, judge_grads = _mean(result.grads, axis_name)
    metrics = _mean(result.metrics, axis_name)
    grad_norm = optax.tree.norm(grads)
    opt_state = set_step(state.opt_state, state.step)
    steps, opt_state = optimizer.update(grads, opt_state, state.params)
    averaged = {
      'params': optax.apply_updates(state.params, steps),
      'batch_stats': result.updates.get('batch_stats', {}),
    }
    proposed = state.replace(
      **averaged,
      codebook=result.updates.get('codebook', state.codebook),
      opt_state=opt_state,
      averages=_average(state.averages, averaged, params_ema_decay),
      discriminator=objective.update(state.discriminator, judge_grads, metrics),
    )
    finite = jnp.isfinite(result.loss) & jnp.isfinite(grad_norm)
    # A variance that overflows divides to zero: loss and gradient stay finite.
    finite &= _all_finite(
      (proposed.batch_stats, proposed.codebook, proposed.discriminator)
    )
    finite &= state.nonfinite_streak < MAX_NONFINITE_STREAK
    new = jax.tree.map(functools.partial(jnp.where, finite), proposed, state)
    streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
    new = new.replace(step=state.step + 1, nonfinite_streak=streak)
    return new, metrics | {
      'loss': result.loss,
      'grad_norm': grad_norm,
      'skipped': 1.0 - finite.astype(jnp.float32),
      'counts': result.counts,
    }

  return train_step


def _augment(key, images, flip: bool, colors: bool, axis_name):
  if flip:
    images = random_flip(key, images, axis_name=axis_name)
  if colors:
    key, images = jax.random.fold_in(key, 1), prepare_images(images)
    images = random_colors(key, images, axis_name=axis_name)
  return images


def _forward_backward(
  model, state, judge, objective, lpips_weights, axis_name, quantize: bool
) -> Callable[..., Pass]:
  """A function (variables, images, key) -> `Pass`."""

  def forward_backward(variables, images, key):
    images = prepare_images(images)

    def loss_fn(params):
      out, updates = model.apply(
        variables | {'params': params},
        images,
        train=True,
        quantize=quantize,
        mutable=['batch_stats', 'codebook'],
        rngs={'codebook': key},
      )
      quantizer, made = out.quantizer, out.reconstruction
      loss, metrics = objective.generator_loss(
        images, made, state.step, judge, lpips_weights
      )
      if quantize:
        loss += quantizer.loss
      # The mean over devices is taken of the loss, not of the gradient alone:
      # under shard_map the gradient of a replicated parameter is a sum.
      return _mean(loss, axis_name), (metrics, made, quantizer, updates)

    def judge_loss_fn(params):
      loss, metrics = objective.discriminator_loss(params, images, made, judge)
      return _mean(loss, axis_name), metrics

    (loss, (metrics, made, quantizer, updates)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(state.params)
    counts, judge_grads = None, None
    if quantize:
      metrics, counts = quantizer.metrics | metrics, quantizer.counts
    if judge is not None:
      judge_grads, more = jax.grad(judge_loss_fn, has_aux=True)(judge['params'])
      metrics |= more
    return Pass(loss, (grads, judge_grads), metrics, counts, updates)

  return forward_backward


def _accumulate(forward_backward, judge, steps: int) -> Callable[..., Pass]:
  """The pass of a batch as S passes of microbatches, at the memory of one.

  Gradients, loss and metrics are averaged, counts are summed. Each microbatch
  starts from the batch_stats and the codebook that the one before it left: the
  codebook is updated S times per step (decay acts S times, and N/K is the
  microbatch's), so S changes the run and a run cannot resume with another S.
  Microbatch s holds the images s, s + S, s + 2S, ..., so that where rows are
  sharded each device works on its own rows.
  """

  def accumulated(variables, images, key):
    def body(carry, microbatch):
      variables, grads = carry
      result = forward_backward(variables, *microbatch)
      grads = jax.tree.map(jnp.add, grads, result.grads)
      carry = variables | result.updates, grads
      return carry, result._replace(grads=None, updates=None)

    parts = images.reshape(-1, steps, *images.shape[1:]).swapaxes(0, 1)
    trained = variables['params'], judge and judge['params']
    zeros = jax.tree.map(jnp.zeros_like, trained)
    (variables, grads), results = jax.lax.scan(
      body, (variables, zeros), (parts, jax.random.split(key, steps))
    )
    metrics, counts = results.metrics, results.counts
    if counts is not None:
      counts = jnp.sum(counts, axis=0)
      metrics |= jax.vmap(diversity)(counts.reshape(-1, counts.shape[-1]))
    mean = lambda x: jnp.mean(x, axis=0)  # noqa: E731
    return Pass(
      mean(results.loss),
      jax.tree.map(lambda g: g / steps, grads),
      jax.tree.map(mean, metrics),
      counts,
      variables,
    )

  return accumulated


def _average(averages, new, decay):
  if averages is None:
    return None
  # So written, the average of what does not move does not move either.
  return jax.tree.map(lambda a, x: a + (1 - decay) * (x - a), averages, new)


def _mean(tree, axis_name):
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _all_finite(tree):
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
