"""`load` and `Tokenizer`: a trained model as two functions."""

import jax
import jax.numpy as jnp

from rvq_jax.models.vqvae import VQVAE
from rvq_jax.training import settings, sharding
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.step import prepare_images


class Tokenizer:
  """Images to token ids and back.

  Args:
    model: the `VQVAE`.
    variables: its collections params, batch_stats and codebook.
    config: the flat config that it was trained with.
    step: the training step of the variables.
  """

  def __init__(self, model: VQVAE, variables, *, config, step: int):
    self.model, self.variables = model, variables
    self.config, self.step = config, step
    self._encode = jax.jit(
      lambda variables, images: model.apply(
        variables, prepare_images(images), method='encode'
      )
    )
    self._decode = jax.jit(
      lambda variables, ids: model.apply(variables, ids, method='decode')
    )

  @property
  def codebook_size(self) -> int:
    """K: ids are in [0, K)."""
    return self.config['model.codebook_size']

  @property
  def factor(self) -> int:
    """Pixels along the side of a token; image sides are multiples of it."""
    return self.config['model.factor']

  def encode(self, images) -> jax.Array:
    """Token ids of images.

    Args:
      images: [B, h, w, 3], uint8 or float in [-1, 1]; `factor` divides h, w.

    Returns:
      ids [B, h/factor, w/factor], int32; [..., L] with several codes a
      position.

    Raises:
      ValueError: another shape, dtype or range.
    """
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
      if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
          f'expected images as uint8 or float in [-1, 1], got {images.dtype}'
        )
      images = images.astype(jnp.float32)
      if images.size and not jnp.max(jnp.abs(images)) <= 1.001:
        raise ValueError(
          'expected float images in [-1, 1], got values from '
          f'{jnp.min(images):.4g} to {jnp.max(images):.4g}; pass uint8, or '
          'x / 127.5 - 1'
        )
    return self._encode(self.variables, images)

  def decode(self, ids) -> jax.Array:
    """Images of token ids.

    Args:
      ids: [B, H, W], integers in [0, K); [B, H, W, L] with several codes a
        position, of which a residual tokenizer takes any first few.

    Returns:
      images [B, H factor, W factor, 3], float32 in [-1, 1].

    Raises:
      ValueError: another shape or dtype, or an id out of range.
    """
    ids = jnp.asarray(ids)
    axes = 4 if self.config['model.quantizer'] in ('residual', 'product') else 3
    if ids.ndim != axes or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(
        f'expected ids [{"B, H, W, L"[: 3 * axes - 2]}] of integers, got '
        f'{ids.dtype} {ids.shape}'
      )
    if ids.size:
      low, high = int(jnp.min(ids)), int(jnp.max(ids))
      if low < 0 or high >= self.codebook_size:
        raise ValueError(
          f'expected ids from 0 to {self.codebook_size - 1}, got {low} to '
          f'{high}; are they of another model?'
        )
    return self._decode(self.variables, ids.astype(jnp.int32))

  def reconstruct(self, images) -> jax.Array:
    """decode(encode(images)); see there."""
    return self.decode(self.encode(images))


def load(workdir, step: int | str | None = None) -> Tokenizer:
  """Loads a trained tokenizer.

  Args:
    workdir: directory of a run.
    step: a saved step, 'best' (lowest validation mse), or None for the newest.

  Returns:
    A `Tokenizer`, on the first device, with the averaged parameters where the
    run kept them.

  Raises:
    FileNotFoundError: there is no such run or step.
    ValueError: the run was made by another version.
  """
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.resolve(step)
    config = checkpoints.meta(step)['config']
    try:
      settings.check_config(config)
    except ValueError as error:
      raise ValueError(
        f'{workdir} was made by another version of rvq_jax: {error}'
      ) from error
    model = settings.build_model(config)
    size = config['data.image_size']
    shapes = dict(
      jax.eval_shape(
        lambda: model.init(
          jax.random.key(0), jnp.zeros((1, size, size, 3)), train=True
        )
      )
    )
    shapes.setdefault('codebook', {})
    shapes.setdefault('batch_stats', {})
    if config['optimizer.params_ema']:
      shapes['params_ema'] = shapes['params']
    device = sharding.replicated(sharding.data_mesh(jax.local_devices()[:1]))
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
    )
    variables = checkpoints.restore_model(abstract, step)
  averaged = variables.pop('params_ema', None)
  if averaged is not None:
    variables['params'] = averaged
  return Tokenizer(model, variables, config=config, step=step)
