"""Images on the device: the model's scale is float32 in [-1, 1]."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
  """Maps uint8 to the model's scale: x / 127.5 - 1, float32 in [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1


def prepare_images(images: jax.Array) -> jax.Array:
  """Images as the model takes them: uint8 becomes float32 in [-1, 1]."""
  return to_float(images) if images.dtype == jnp.uint8 else images


def random_flip(
  key: jax.Array, images: jax.Array, *, axis_name=None
) -> jax.Array:
  """Mirrors each image left to right with probability one half.

  It depends on the key and on the index in the global batch alone; under
  `axis_name` images [B, h, w, 3] are the share of one device.
  """
  rows = images.shape[0]
  if axis_name is None:
    flip = jax.random.bernoulli(key, shape=(rows,))
  else:
    total = rows * jax.lax.axis_size(axis_name)
    flip = jax.lax.dynamic_slice_in_dim(
      jax.random.bernoulli(key, shape=(total,)),
      rows * jax.lax.axis_index(axis_name),
      rows,
    )
  return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
