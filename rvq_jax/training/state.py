"""What a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
  """The whole state of a run; every leaf is an array.

  Attributes:
    step: optimizer steps taken, int32.
    params: trained parameters, float32.
    batch_stats: running means and variances of BatchNorm.
    codebook: the collection 'codebook'; empty with a learned codebook.
    opt_state: the optimizer's state.
    params_ema: moving average of params for evaluation, or None.
    nonfinite_streak: steps skipped in a row because loss or gradient was not
      finite, int32.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  codebook: Any
  opt_state: Any
  params_ema: Any
  nonfinite_streak: jax.Array

  @property
  def variables(self) -> dict[str, Any]:
    """The model's collections with the parameters that training moves."""
    return {
      'params': self.params,
      'batch_stats': self.batch_stats,
      'codebook': self.codebook,
    }

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The model's collections with averaged parameters where there are any."""
    params = self.params if self.params_ema is None else self.params_ema
    return self.variables | {'params': params}


def create_state(
  model,
  optimizer,
  key: jax.Array,
  *,
  image_size: int,
  batch_size: int,
  params_ema: bool = False,
) -> TrainState:
  """The state before the first step.

  Call under `jax.jit`: every leaf gets its own buffer, which donation needs,
  and the forward pass, whose result nothing uses, is not computed.

  Args:
    model: a `VQVAE`.
    optimizer: an optax transformation, from `make_optimizer`.
    key: random key of the initial parameters.
    image_size: side of the training images in pixels.
    batch_size: images of a forward pass, over all devices: codes of
      `init_from='normal'` start with the count that they expect in it.
    params_ema: keep a moving average of the parameters.
  """
  shape = (batch_size, image_size, image_size, 3)
  variables = model.init(key, jnp.zeros(shape, jnp.float32), train=True)
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    codebook=variables.get('codebook', {}),
    opt_state=optimizer.init(params),
    params_ema=jax.tree.map(jnp.copy, params) if params_ema else None,
    nonfinite_streak=jnp.zeros((), jnp.int32),
  )
