"""`Tokenizer`: a trained model as two functions, and the form of its ids."""

import functools
import json
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from rvq_jax.io import tree_digest
from rvq_jax.metrics import prepare_images
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.quantize.codebook import COUNTS
from rvq_jax.training.build import RunData, architecture

UNIT_RANGE = (
  'float images with all values in [0, 1] are read on [-1, 1], from grey to '
  'white; if 0 is black, pass 2 * x - 1'
)


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
    variables: its collections params, batch_stats and codebook.
    config: the flat config of its training.
    step: the training step of the variables.

  Attributes:
    codebook_size: K; ids are in [0, K).
    factor: pixels along the side of a token; it divides the sides of images.
    quantizer: its name in a config.
    image_size: side of the training images, in pixels.
    any_size: whether it encodes images of other sizes.
    axes: axes of ids: '[B, H, W]', '[B, H, W, L]' or '[B, T]' (multi-scale).
    codes_per_position: L; None without that axis.
    sides: sides of the scales; None unless multi-scale.
    prefixes: decodable lengths of the last axis of residual or multi-scale ids,
      coarse to fine; else [].
    ids_dtype: the smallest unsigned integer for K, the dtype of ids in files.
  """

  def __init__(
    self,
    model: VQVAE,
    variables: dict[str, Any],
    *,
    config: Mapping[str, Any],
    step: int,
  ):
    self.model, self.variables = model, variables
    self.config, self.step = config, step
    self.codebook_size, self.factor = model.vq.codebook_size, model.factor
    self.image_size = RunData(config).image_size
    self.quantizer = json.loads(architecture(config))['quantizer']
    self.ids_dtype = np.min_scalar_type(self.codebook_size - 1)
    self.sides = getattr(model.vq, 'sides', None)
    depth = getattr(model.vq, 'depth', None)
    self.codes_per_position = depth or getattr(model.vq, 'heads', None)
    self.any_size = not self.sides
    self.axes, self.prefixes = '[B, H, W]', list(range(1, (depth or 0) + 1))
    if self.codes_per_position:
      self.axes = '[B, H, W, L]'
    if self.sides:
      from rvq_jax.quantize.scales import token_offsets  # no other needs it

      self.axes, self.prefixes = '[B, T]', token_offsets(self.sides)[1:]
    self._encode = jax.jit(
      lambda v, x: model.apply(v, prepare_images(x), method='encode')
    )
    self._decode = jax.jit(functools.partial(model.apply, method='decode'))

  def ids_shape(self, height: int, width: int) -> tuple[int, ...]:
    """Shape of the ids of an image: [H, W(, L)] or [T]."""
    if self.sides:
      return (self.prefixes[-1],)
    codes = self.codes_per_position
    grid = -(-height // self.factor), -(-width // self.factor)
    return grid + ((codes,) if codes else ())

  def levels(self, ids: jax.Array | np.ndarray) -> list[Any]:
    """The ids, or a prefix of their levels, as one grid [B, h, w] per level.

    A level is one code per position, or a scale; coarse to fine.
    """
    if self.codes_per_position:
      return [ids[..., i] for i in range(ids.shape[-1])]
    if not self.sides:
      return [ids]
    parts = zip([0, *self.prefixes], self.prefixes, self.sides, strict=False)
    return [
      ids[:, start:end].reshape(-1, side, side)
      for start, end, side in parts
      if end <= ids.shape[1]
    ]

  def join(self, levels: list[np.ndarray]) -> np.ndarray:
    """The ids of all `levels`, or of the first few."""
    if self.sides:
      return np.concatenate([x.reshape(len(x), -1) for x in levels], axis=1)
    return np.stack(levels, -1) if self.codes_per_position else levels[0]

  def grid(self, ids: jax.Array) -> jax.Array:
    """The latents [B, H, W, C] of unchecked ids; traceable."""
    grid: Any = self.model.apply(
      self.variables, ids, method=lambda model, x: model.vq.codes_from_ids(x)
    )
    return grid

  def codebooks(self) -> list[jax.Array]:
    """The vectors [K, C] of all codes, per level; scales share one codebook."""
    codes, ids = self.codes_per_position, jnp.arange(self.codebook_size)
    if self.sides:  # the codes themselves, not their addends of the grid
      scales: Any = self.model.apply(
        self.variables, method=lambda model: model.vq.codes()
      )
      return [scales]
    if not codes:
      return [self.grid(ids)]
    zeros = jnp.zeros((len(ids), codes), jnp.int32)
    return [self.grid(zeros.at[:, level].set(ids)) for level in range(codes)]

  @functools.cached_property
  def model_hash(self) -> str:
    """SHA-256 of architecture and arrays; the same for a run and its export."""
    return tree_digest(self.variables, header=self.architecture())

  @functools.cached_property
  def encoder_hash(self) -> str:
    """SHA-256 of all parts that give ids their meaning: not the decoder."""
    arrays = {
      name: array
      for name, array in flatten_dict(dict(self.variables), sep='.').items()
      if name.split('.')[1] in ('encoder', 'vq') and not name.endswith(COUNTS)
    }
    return tree_digest(arrays, header=self.architecture())

  def architecture(self) -> str:
    """JSON of the model's form; see `build.architecture`."""
    return architecture(self.config, self.sides)

  def about_ids(self) -> dict[str, Any]:
    """JSON values about the model, for files of ids."""
    about = {
      'model_hash': self.model_hash,
      'encoder_hash': self.encoder_hash,
      'codebook_size': self.codebook_size,
      'factor': self.factor,
    }
    if self.sides:
      about |= {'sides': list(self.sides), 'offsets': [0, *self.prefixes]}
    return about

  def check_encoder(self, encoder_hash: str, name: object) -> None:
    """Raises ValueError if another encoder made the ids in `name`."""
    if encoder_hash != self.encoder_hash:
      raise ValueError(
        f'{name}: expected the encoder {encoder_hash[:16]}, got '
        f'{self.encoder_hash[:16]}; pass the --workdir and --step that wrote '
        'it, or a run that fine-tuned their decoder'
      )

  def encode(self, images: ArrayLike) -> jax.Array:
    """Token ids of images: int32 of `axes`, H = h / factor, W = w / factor.

    Args:
      images: [B, h, w, 3], uint8 or float in [-1, 1]; `factor` divides h, w.
        A multi-scale tokenizer takes only `image_size`. Floats that all lie in
        [0, 1] cause a warning.

    Raises:
      ValueError: wrong shape, dtype or range.
    """
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
      return self._encode(self.variables, images)
    images = prepare_images(images)
    if images.size and not jnp.all(jnp.abs(images) <= 1.001):
      raise ValueError(
        f'expected float images in [-1, 1], got values from {images.min():.4g} '
        f'to {images.max():.4g}, {jnp.isnan(images).sum()} of them NaN; pass '
        'uint8, or x / 127.5 - 1'
      )
    if images.size and 0 <= jnp.min(images) < jnp.max(images):
      warnings.warn(UNIT_RANGE, stacklevel=2)
    return self._encode(self.variables, images)

  def decode(self, ids: ArrayLike) -> jax.Array:
    """Images of token ids: float32 [B, H factor, W factor, 3] in [-1, 1].

    Args:
      ids: integers in [0, K) with `axes`, or a prefix: see `prefixes`.

    Raises:
      ValueError: wrong shape or dtype, or an id out of range.
    """
    ids = jnp.asarray(self.check_ids(ids), jnp.int32)
    return self._decode(self.variables, ids)

  def check_ids(self, ids: ArrayLike) -> np.ndarray | jax.Array:
    """The ids as an array; ValueError if `decode` refuses them."""
    # Not jnp: it would wrap 64 bits to 32 before the check.
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    axes = self.axes.count(',') + 1
    if ids.ndim != axes or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f'expected integer ids {self.axes}, got {ids.dtype} {list(ids.shape)}'
      )
    last = self.codebook_size - 1
    if ids.size and not 0 <= ids.min() <= ids.max() <= last:
      raise ValueError(
        f'expected ids from 0 to {last}, got {ids.min()} to {ids.max()}; pass '
        'the model that made them'
      )
    return ids

  def reconstruct(self, images: ArrayLike) -> jax.Array:
    """decode(encode(images)); see there."""
    return self.decode(self.encode(images))
