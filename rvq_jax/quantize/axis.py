"""A mapped axis of `pmap` or `shard_map`, or none where the batch is whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axis(NamedTuple):
  """Sums and places over a mapped axis; without one they change nothing.

  Attributes:
    name: mapped axis or axes; None where a device sees the whole batch.
  """

  name: Any = None

  @property
  def size(self) -> int:
    """Number of shares of the batch."""
    return 1 if self.name is None else jax.lax.axis_size(self.name)

  @property
  def index(self) -> int | jax.Array:
    """Which share this device has."""
    return 0 if self.name is None else jax.lax.axis_index(self.name)

  def psum(self, x: jax.Array) -> jax.Array:
    """Sum of x over the shares."""
    return x if self.name is None else jax.lax.psum(x, self.name)

  def concatenate(self, x: jax.Array) -> jax.Array:
    """x [n] of all shares in order: an all-gather that `shard_map` trusts."""
    if self.name is None:
      return x
    everyone = jnp.zeros(len(x) * self.size, x.dtype)
    first = len(x) * self.index
    return self.psum(jax.lax.dynamic_update_slice_in_dim(everyone, x, first, 0))
