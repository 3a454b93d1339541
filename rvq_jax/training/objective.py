"""The losses of the model and of the discriminator D.

For images x [B, h, w, 3] in [-1, 1], reconstructions y and t steps taken,

  L_G = pixel(x, y) + w_p LPIPS(x, y) + r(t) w_a mean softplus(-D(y))
  L_D = (mean softplus(-D(x)) + mean softplus(D(y))) / 2 + w_l LeCAM

plus the quantizer's loss in L_G. The weights are fixed. D learns for w steps
before its loss counts. With s = num_steps / 3 and w = min(2000, num_steps / 10)
D learns from step s - w on, and r(t) = clip((t - s) / w, 0, 1). All losses are
float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rvq_jax import sharding
from rvq_jax.models import lpips
from rvq_jax.models.discriminator import Discriminator

AVERAGES_DECAY = 0.999
LOGITS = 'logits_real', 'logits_fake'


@dataclasses.dataclass(frozen=True)
class Objective:
  """Losses and their weights; D and its update.

  Attributes:
    pixel: 'mse' or 'l1'.
    perceptual_weight: w_p of LPIPS by VGG16.
    adversarial_weight: w_a; 0: no D.
    lecam_weight: w_l.
    discriminator_learning_rate: Adam's (0.9, 0.95), constant.
    num_steps: steps of the run when it started, see `resumed`.
    dtype: compute dtype of D and of LPIPS.
  """

  pixel: str = 'mse'
  perceptual_weight: float = 0.0
  adversarial_weight: float = 0.0
  lecam_weight: float = 1e-3
  discriminator_learning_rate: float = 1e-4
  num_steps: int = 1
  dtype: Any = jnp.float32

  @property
  def start(self) -> int:
    """s: steps before r(t) rises."""
    return self.num_steps // 3

  @property
  def ramp(self) -> int:
    """w: steps in which r(t) rises from 0 to 1."""
    return max(min(2000, self.num_steps // 10), 1)

  @property
  def discriminator_start(self) -> int:
    """s - w: steps before D is updated."""
    return max(self.start - self.ramp, 0)

  def is_adversarial(self, step: int) -> bool:
    """Whether step number `step`, from 1, updates D."""
    return self.adversarial_weight > 0 and step > self.discriminator_start

  def adversarial_ramp(self, step: jax.Array) -> jax.Array:
    """r(t), float32, after `step` steps."""
    return jnp.clip((step - self.start) / self.ramp, 0.0, 1.0)

  def load_lpips(self, mesh):
    """The weights of LPIPS on all devices of a mesh; None if w_p is 0."""
    if not self.perceptual_weight:
      return None
    from rvq_jax.models import lpips_weights

    return sharding.replicate(lpips_weights.load(), mesh)

  def init_discriminator(self, key: jax.Array, image_size: int):
    """D's part of the state, or None: params, opt_state, LeCAM's averages.

    Also num_steps, int32, which a lengthened run keeps.
    """
    if not self.adversarial_weight:
      return None
    images = jnp.zeros((1, image_size, image_size, 3))
    params = Discriminator(dtype=self.dtype).init(key, images)['params']
    averages = {name: jnp.zeros(()) for name in LOGITS}
    opt_state = self._optimizer.init(params)
    num_steps = jnp.asarray(self.num_steps, jnp.int32)
    return averages | {
      'params': params,
      'opt_state': opt_state,
      'num_steps': num_steps,
    }

  def resumed(self, discriminator) -> 'Objective':
    """With the first s and w of the run; discriminator: D's part, or None."""
    if discriminator is None:
      return self
    return dataclasses.replace(self, num_steps=int(discriminator['num_steps']))

  def generator_loss(
    self, x, y, step, discriminator=None, lpips_weights=None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_G without the quantizer's loss, and its parts; t is `step`.

    Without D's part of the state w_a is 0; `load_lpips` gives lpips_weights.
    """
    metrics = {'mse': jnp.mean((y - x) ** 2)}
    if self.pixel == 'l1':
      metrics['l1'] = jnp.mean(jnp.abs(y - x))
    loss = metrics[self.pixel]
    if self.perceptual_weight:
      distances = lpips.distance(lpips_weights, x, y, dtype=self.dtype)
      metrics['lpips'] = jnp.mean(distances)
      loss += self.perceptual_weight * metrics['lpips']
    if discriminator is not None:
      logits = self._logits(discriminator['params'], y)
      ramp = self.adversarial_ramp(step)
      metrics['adversarial_ramp'] = ramp
      metrics['adversarial_loss'] = jnp.mean(jax.nn.softplus(-logits))
      loss += ramp * self.adversarial_weight * metrics['adversarial_loss']
    return loss, metrics

  def discriminator_loss(self, params, x, y, averages):
    """L_D for D's params, and its parts; 'discriminator_loss' excludes LeCAM.

    LeCAM (arXiv:2104.03310, eq. 7) is mean relu(D(x) - m_fake)^2 +
    mean relu(m_real - D(y))^2 with moving averages m, in D's part of the state.
    """
    real, fake = self._logits(params, x), self._logits(params, y)
    loss = jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
    excess = real - averages['logits_fake'], averages['logits_real'] - fake
    metrics = {
      'discriminator_loss': loss / 2,
      'lecam': sum(jnp.mean(jax.nn.relu(x) ** 2) for x in excess),
      'logits_real': jnp.mean(real),
      'logits_fake': jnp.mean(fake),
    }
    return loss / 2 + self.lecam_weight * metrics['lecam'], metrics

  def update(self, old, grads, metrics):
    """D's part of the state after a step; `old` is the part before it.

    grads are L_D's, or None: D does not change. metrics hold L_D's parts.
    """
    if grads is None:
      return old
    steps, opt_state = self._optimizer.update(grads, old['opt_state'])
    new, before = ({n: x[n] for n in LOGITS} for x in (metrics, old))
    averages = optax.incremental_update(new, before, 1 - AVERAGES_DECAY)
    params = optax.apply_updates(old['params'], steps)
    return old | {'params': params, 'opt_state': opt_state, **averages}

  @property
  def _optimizer(self):
    return optax.adam(self.discriminator_learning_rate, b2=0.95)

  def _logits(self, params, images):
    return Discriminator(dtype=self.dtype).apply({'params': params}, images)


MSE = Objective()
