"""Random changes of images on the device, float32 in [-1, 1]."""

import jax
import jax.numpy as jnp

from rvq_jax.quantize.codebook import Axis


def random_flip(key, images: jax.Array, *, axis_name=None) -> jax.Array:
  """Mirrors each image left to right with probability one half.

  The draw depends only on the key and the index in the global batch; under
  `axis_name` images [B, h, w, 3] are the share of one device.
  """
  flip = _per_image(jax.random.bernoulli, key, images.shape[:1], axis_name)
  return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_colors(key, images: jax.Array, *, axis_name=None) -> jax.Array:
  """Draws hue, order of channels, saturation and contrast for each image.

  With G the mean of a pixel's channels and m the mean of G over the image,

      y = a (G + s R (x - G) - m) + m,  clipped to [-1, 1]

  R turns colours about the grey axis by any angle; half of the images first
  swap two channels, so every channel order can occur. s = 2^U(-1.5, 0.5),
  a = 2^U(-0.5, 0.5). Images are [B, h, w, 3] in [-1, 1]; see `random_flip`.
  """
  u = _per_image(jax.random.uniform, key, (len(images), 4), axis_name)
  u = u[:, :, None, None]
  swapped = jnp.where(u[:, 0, ..., None] < 0.5, images, images[..., (1, 0, 2)])
  grey = jnp.mean(swapped, axis=-1, keepdims=True)
  color = swapped - grey
  angle = 2 * jnp.pi * u[:, 1, ..., None]
  # Rodrigues' formula about (1, 1, 1) / sqrt(3), for an orthogonal vector.
  across = (color[..., (1, 2, 0)] - color[..., (2, 0, 1)]) / jnp.sqrt(3.0)
  turned = jnp.cos(angle) * color - jnp.sin(angle) * across
  saturation, contrast = (
    2 ** (low + (0.5 - low) * u[:, i, ..., None])
    for i, low in ((2, -1.5), (3, -0.5))
  )
  mean = jnp.mean(grey, axis=(1, 2), keepdims=True)
  colored = contrast * (grey + saturation * turned - mean) + mean
  return jnp.clip(colored, -1.0, 1.0)


def _per_image(draw, key, shape, axis_name):
  """draw(key, shape), a row per image of this device's share of a batch."""
  axis, (rows, *rest) = Axis(axis_name), shape
  drawn = draw(key, shape=(axis.size * rows, *rest))
  return jax.lax.dynamic_slice_in_dim(drawn, axis.rank * rows, rows)
