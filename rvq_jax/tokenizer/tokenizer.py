"""`Tokenizer`: a trained model as two functions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rvq_jax.data.images import prepare_images
from rvq_jax.io import tree_digest
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.codebook import COUNTS

# With the arrays, these fields decide which function a model computes.
_SHAPING = (
  'widths factor num_res_blocks num_heads code_dim quantizer codebook_size '
  'activation cosine depth heads dtype'
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
    self._decode = jax.jit(functools.partial(model.apply, method='decode'))

  @property
  def codebook_size(self) -> int:
    """K: ids are in [0, K)."""
    return self.config['model.codebook_size']

  @property
  def factor(self) -> int:
    """Pixels along the side of a token; image sides are multiples of it."""
    return self.config['model.factor']

  @property
  def codes_per_position(self) -> int | None:
    """L where ids are [B, H, W, L]; None where they are [B, H, W]."""
    quantizer = self.config['model.quantizer']
    name = {'residual': 'depth', 'product': 'heads'}.get(quantizer)
    return self.config[f'model.{name}'] if name else None

  @property
  def sides(self) -> tuple[int, ...] | None:
    """Sides of the scales of a multi-scale tokenizer, whose ids are [B, T]."""
    return getattr(self.model.vq, 'sides', None)

  @property
  def prefixes(self) -> list[int]:
    """Lengths of the last axis of ids that decode, coarse to fine.

    Those of a residual or multi-scale tokenizer; [] of any other.
    """
    if self.sides:
      from rvq_jax.quantize.scales import token_offsets  # no other needs it

      return token_offsets(self.sides)[1:]
    residual = self.config['model.quantizer'] == 'residual'
    return list(range(1, self.codes_per_position + 1)) if residual else []

  def ids_shape(self, height: int, width: int) -> tuple[int, ...]:
    """Shape of the ids of an image of so many pixels."""
    if self.sides:
      return (self.prefixes[-1],)
    codes = self.codes_per_position
    grid = -(-height // self.factor), -(-width // self.factor)
    return grid + ((codes,) if codes else ())

  @functools.cached_property
  def model_hash(self) -> str:
    """SHA-256 of architecture and arrays; the same for a run and its export."""
    return tree_digest(self.variables, header=self._architecture())

  @functools.cached_property
  def encoder_hash(self) -> str:
    """SHA-256 of architecture, encoder and codes, all that gives ids a meaning.

    The same after fine-tuning the decoder alone.
    """
    arrays = {
      name: array
      for name, array in flatten_dict(dict(self.variables), sep='.').items()
      if name.split('.')[1] in ('encoder', 'vq') and not name.endswith(COUNTS)
    }
    return tree_digest(arrays, header=self._architecture())

  def _architecture(self) -> str:
    shaping = {name: self.config[f'model.{name}'] for name in _SHAPING}
    if self.sides:
      shaping['sides'] = self.sides
    return json.dumps(shaping, sort_keys=True)

  def encode(self, images) -> jax.Array:
    """Token ids of images.

    Args:
      images: [B, h, w, 3], uint8 or float in [-1, 1]; `factor` divides h, w.
        A multi-scale tokenizer takes the size that it was trained with.

    Returns:
      ids [B, h/factor, w/factor], int32; [..., L] with several codes per
      position; [B, T] of a multi-scale tokenizer, the coarsest scale first.

    Raises:
      ValueError: another shape, dtype or range.
    """
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
      images = _checked_floats(images)
    return self._encode(self.variables, images)

  def decode(self, ids) -> jax.Array:
    """Images of token ids.

    Args:
      ids: [B, H, W], integers in [0, K); [B, H, W, L] with several codes per
        position, of which a residual tokenizer takes any first few; [B, T] of
        all scales of a multi-scale tokenizer, or of the first ones.

    Returns:
      images [B, H factor, W factor, 3], float32 in [-1, 1].

    Raises:
      ValueError: another shape or dtype, or an id out of range.
    """
    # Not through jnp: it would wrap 64 bits to 32 before the check.
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    shape = '[B, H, W, L]' if self.codes_per_position else '[B, H, W]'
    shape = '[B, T]' if self.sides else shape
    axes = shape.count(',') + 1
    if ids.ndim != axes or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f'expected ids {shape} of integers, got {ids.dtype} {list(ids.shape)}'
      )
    last = self.codebook_size - 1
    if ids.size and not 0 <= ids.min() <= ids.max() <= last:
      raise ValueError(
        f'expected ids from 0 to {last}, got {ids.min()} to {ids.max()}; are '
        'they of another model?'
      )
    return self._decode(self.variables, jnp.asarray(ids, jnp.int32))

  def reconstruct(self, images) -> jax.Array:
    """decode(encode(images)); see there."""
    return self.decode(self.encode(images))


def _checked_floats(images: jax.Array) -> jax.Array:
  """Images as float32; refuses other dtypes, and values outside [-1, 1]."""
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'expected images as uint8 or float in [-1, 1], got {images.dtype}'
    )
  if images.size and not jnp.max(jnp.abs(images)) <= 1.001:
    raise ValueError(
      f'expected float images in [-1, 1], got values from {images.min():.4g} '
      f'to {images.max():.4g}; pass uint8, or x / 127.5 - 1'
    )
  return images.astype(jnp.float32)
