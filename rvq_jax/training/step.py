"""The train step: a pure function of state and batch.

One step runs under `jit` with shardings (no axis name: the batch is global),
and under `pmap` and `shard_map` (axis_name given to the step and to the model:
each device holds its share of the batch).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rvq_jax import sharding
from rvq_jax.data.images import random_colors, random_flip
from rvq_jax.metrics import diversity, prepare_images
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.training.objective import MSE, Objective
from rvq_jax.training.state import (
  FAST_COMPILE,
  TrainState,
  create_state,
  idle_parts,
)

MAX_SKIPPED = 10
"""Steps in a row that may be skipped; then every later update is discarded."""


class PassResult(NamedTuple):
  """A forward and backward pass over a batch."""

  loss: jax.Array  # float32 scalar of the global batch
  grads: tuple[Any, Any]  # of the parameters, and of D's parameters or None
  metrics: dict[str, jax.Array]  # float32 scalars of this device's batch
  counts: jax.Array | None  # of codes in the global batch, [K] or [L, K]
  updates: dict[str, Any]  # batch_stats and codebook after the pass


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """`step(state, batch, lpips_weights=None)` -> next state and metrics.

  A step minimises the objective, by default MSE(reconstruction, image) on
  [-1, 1], plus the quantizer's loss (paper eq. 5). Its randomness depends only
  on (seed, step) and on an image's index in the global batch, so any number of
  devices takes the same step. If the loss, the gradient, the new statistics,
  the new codebook or the new discriminator are not finite, the update is
  discarded: only `step` (so the schedule advances) and `nonfinite_streak`
  change. After ten such steps in a row, every later update is discarded.

  The batch is {'image': [B, h, w, 3] uint8, or float in [-1, 1]}; only a
  perceptual loss needs lpips_weights. The metrics are float32 scalars of the
  global batch, and 'counts' [K] (None without quantization).

  Attributes:
    model: a `VQVAE`, made with the same axis_name.
    optimizer: from `make_optimizer`; any of optax works but does not freeze.
    objective: the losses other than the quantizer's.
    seed: for flips, colours and the replacement of codes.
    flip: mirror each image with probability 1/2.
    colors: see `random_colors`.
    params_ema_decay: for the state's averages; see `TrainState.next_averages`.
    accumulate_steps: microbatches per step; see `_accumulated`.
    freeze: the parts that do not train; see `idle_parts`. The model must agree.
    quantize: False: the decoder gets the latents, and the step leaves out the
      codebook, its losses and metrics (arXiv:2605.06870).
    adversarial: the discriminator D takes part and is updated.
    axis_name: mapped axis under `pmap` or `shard_map`; None under `jit`.
  """

  model: VQVAE
  optimizer: optax.GradientTransformation
  objective: Objective = MSE
  seed: int | jax.Array = 0
  flip: bool = True
  colors: bool = False
  params_ema_decay: float = 0.0
  accumulate_steps: int = 1
  freeze: str = ''
  quantize: bool = True
  adversarial: bool = False
  axis_name: Any = None

  def __call__(self, state: TrainState, batch, lpips_weights=None):
    """See the class."""
    state = state.with_settled(self._idle)
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    flip_key, codebook_key = jax.random.split(key)
    images = self._augment(flip_key, batch['image'])
    judged = state if self.adversarial else state.replace(discriminator=None)
    run_pass = functools.partial(self._pass, judged, lpips_weights)
    if self.accumulate_steps > 1:
      run_pass = functools.partial(self._accumulated, run_pass, judged)
    result = run_pass(state.variables, images, codebook_key)

    grads, discriminator_grads = self._mean(result.grads)
    metrics = self._mean(result.metrics)
    grad_norm = optax.tree.norm(grads)
    steps, opt_state = optax.with_extra_args_support(self.optimizer).update(
      grads, state.opt_state, state.params, step=state.step, idle=self._idle
    )
    averaged = {
      'params': optax.apply_updates(state.params, steps),
      'batch_stats': result.updates.get('batch_stats', {}),
    }
    proposed = state.replace(
      **averaged,
      codebook=self._codebook(state.codebook, result.updates),
      opt_state=opt_state,
      averages=state.next_averages(averaged, self.params_ema_decay),
      discriminator=self.objective.update(
        state.discriminator, discriminator_grads, metrics
      ),
    )
    finite = jnp.isfinite(result.loss) & jnp.isfinite(grad_norm)
    # Division by an overflowed variance gives 0: loss and gradient stay finite.
    finite &= _all_finite(
      (proposed.batch_stats, proposed.codebook, proposed.discriminator)
    )
    finite &= state.nonfinite_streak < MAX_SKIPPED
    new = jax.tree.map(functools.partial(jnp.where, finite), proposed, state)
    streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
    new = new.replace(step=state.step + 1, nonfinite_streak=streak)
    return new, metrics | {
      'loss': result.loss,
      'grad_norm': grad_norm,
      'skipped': 1.0 - finite.astype(jnp.float32),
      'counts': result.counts,
    }

  def phase(self, number: int, *, quantize_after: int = 0) -> 'TrainStep':
    """The step with number `number` of a run, from 1."""
    return dataclasses.replace(
      self,
      quantize=number > quantize_after,
      adversarial=self.objective.is_adversarial(number),
    )

  @property
  def _idle(self):
    return idle_parts(self.freeze, quantize=self.quantize)

  def _codebook(self, old, updates):
    if 'quantizer' in self._idle:  # pauses a schedule inside the layer, too
      return _with_counters(old, updates.get('codebook', old))
    return updates.get('codebook', old)

  def _augment(self, key, images):
    if self.flip:
      images = random_flip(key, images, axis_name=self.axis_name)
    if self.colors:
      key, images = jax.random.fold_in(key, 1), prepare_images(images)
      images = random_colors(key, images, axis_name=self.axis_name)
    return images

  def _pass(self, state, lpips_weights, variables, images, key) -> PassResult:
    """The pass over a batch, with D and the step of `state`."""
    images, discriminator = prepare_images(images), state.discriminator

    def loss_fn(params):
      out, updates = self.model.apply(
        variables | {'params': params},
        images,
        train=True,
        quantize=self.quantize,
        mutable=['batch_stats', 'codebook'],
        rngs={'codebook': key},
      )
      loss, metrics = self.objective.generator_loss(
        images, out.reconstruction, state.step, discriminator, lpips_weights
      )
      counts = None
      if self.quantize:
        loss += out.quantizer.loss
        metrics, counts = out.quantizer.metrics | metrics, out.quantizer.counts
      # Average the loss over devices, not only the gradient: under shard_map
      # the gradient of a replicated parameter is a sum.
      return self._mean(loss), (out.reconstruction, metrics, counts, updates)

    def discriminator_loss_fn(params):
      loss, metrics = self.objective.discriminator_loss(
        params, images, reconstruction, discriminator
      )
      return self._mean(loss), metrics

    (loss, (reconstruction, metrics, counts, updates)), grads = (
      jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])
    )
    discriminator_grads, more = None, {}
    if discriminator is not None:
      gradient = jax.grad(discriminator_loss_fn, has_aux=True)
      discriminator_grads, more = gradient(discriminator['params'])
    grads = grads, discriminator_grads
    return PassResult(loss, grads, metrics | more, counts, updates)

  def _accumulated(self, run_pass, state, variables, images, key) -> PassResult:
    """The pass over a batch as S passes over microbatches, in one's memory.

    It averages gradients, loss and metrics and sums counts. Each microbatch
    starts from the batch_stats and the codebook of the previous one: decay acts
    S times per step, and N/K is the microbatch's, so a run cannot resume with
    another S. Microbatch s holds the images s, s + S, s + 2S, ..., so that each
    device works on its own rows.
    """
    steps, start = self.accumulate_steps, variables['codebook']

    def body(carry, microbatch):
      variables, grads = carry
      # A schedule inside a layer counts steps, not microbatches.
      codebook = _with_counters(start, variables['codebook'])
      result = run_pass(variables | {'codebook': codebook}, *microbatch)
      grads = jax.tree.map(jnp.add, grads, result.grads)
      carry = variables | result.updates, grads
      return carry, result._replace(grads=None, updates=None)

    parts = images.reshape(-1, steps, *images.shape[1:]).swapaxes(0, 1)
    discriminator = state.discriminator
    trained = state.params, discriminator and discriminator['params']
    zeros = jax.tree.map(jnp.zeros_like, trained)
    (variables, grads), results = jax.lax.scan(
      body, (variables, zeros), (parts, jax.random.split(key, steps))
    )
    metrics, counts = results.metrics, results.counts
    if counts is not None:
      counts = jnp.sum(counts, axis=0)
      metrics |= jax.vmap(diversity)(counts.reshape(-1, counts.shape[-1]))
    loss, metrics = jax.tree.map(
      functools.partial(jnp.mean, axis=0), (results.loss, metrics)
    )
    grads = jax.tree.map(lambda g: g / steps, grads)
    return PassResult(loss, grads, metrics, counts, variables)

  def _mean(self, tree):
    if self.axis_name is None:
      return tree
    return jax.lax.pmean(tree, self.axis_name)


def compile_init(step: TrainStep, mesh, image_size: int, batch_size: int):
  """(key, variables=None) -> first `TrainState`, jitted for a mesh.

  The state is on all devices. `variables` are collections that replace random
  ones; `.eval_shape(key)` returns shapes and shardings.
  """

  def init(key, variables=None):
    return create_state(step, key, image_size, batch_size, variables)

  everywhere = sharding.replicated(mesh)
  return jax.jit(init, out_shardings=everywhere, compiler_options=FAST_COMPILE)


def jit_step(mesh):
  """`jax.jit` of (step, seed, state, batch, lpips_weights), for the devices."""
  everywhere, rows = sharding.replicated(mesh), sharding.by_rows(mesh)

  def train_step(step, seed, state, batch, lpips_weights):
    return dataclasses.replace(step, seed=seed)(state, batch, lpips_weights)

  return jax.jit(
    train_step,
    static_argnums=0,
    in_shardings=(everywhere, everywhere, rows, everywhere),
    out_shardings=everywhere,
    donate_argnums=2,
  )


def compile_step(mesh) -> Callable:
  """(step, state, batch, lpips_weights=None) -> new state and metrics.

  Each `TrainStep` is compiled for a mesh at its first call and donates the
  state. Seed and weights are arguments of the program: steps that differ only
  in the seed share it in the compilation cache.
  """
  program = jit_step(mesh)
  return lambda step, state, batch, lpips_weights=None: program(
    *(dataclasses.replace(step, seed=0), np.int32(step.seed)),
    *(state, batch, lpips_weights),
  )


def _with_counters(old, new):
  """The collection `new` with the integers of `old`, which count steps."""

  def pick(x, y):
    return x if jnp.issubdtype(x.dtype, jnp.integer) else y

  return jax.tree.map(pick, old, new)


def _all_finite(tree):
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
