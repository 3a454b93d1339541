"""`Tokenizer`: a trained model as two functions."""

import functools
import hashlib
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.data.images import prepare_images
from rvq_jax.models.vqvae import VQVAE

# What decides, with the arrays, which function a model is.
_SHAPING = (
  'widths factor num_res_blocks num_heads code_dim quantizer codebook_size '
  'cosine depth heads dtype'
).split()


class Tokenizer:
  """Images to token ids and back; `load` makes one.

  >>> import numpy as np
  >>> from rvq_jax import load
  >>> tokenizer = load('runs/photos')
  >>> tokenizer.factor
  4
  >>> images = np.zeros((2, 64, 48, 3), np.uint8)
  >>> ids = tokenizer.encode(images)
  >>> ids.shape, bool(ids.max() < tokenizer.codebook_size)
  ((2, 16, 12), True)
  >>> tokenizer.decode(ids).shape
  (2, 64, 48, 3)

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

  @property
  def codes(self) -> int | None:
    """L, where ids are [..., L]: several codes a position; else None."""
    name = {'residual': 'depth', 'product': 'heads'}.get(
      self.config['model.quantizer']
    )
    return self.config[f'model.{name}'] if name else None

  codes_per_position = codes

  @functools.cached_property
  def model_hash(self) -> str:
    """SHA-256 in hex of the architecture and of every array, by name.

    A run, its export and any copy of either have the same.
    """
    shaping = {name: self.config[f'model.{name}'] for name in _SHAPING}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
    arrays = flax.traverse_util.flatten_dict(self.variables, sep='.')
    for name, array in sorted(arrays.items()):
      array = np.asarray(array)
      digest.update(f'{name} {array.dtype} {array.shape}'.encode())
      digest.update(array.tobytes())
    return digest.hexdigest()

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
    axes = 4 if self.codes else 3
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
