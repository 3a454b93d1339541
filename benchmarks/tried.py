"""What the package does not have, tried in docs/gradients.md.

Importing this module adds its estimators to `ESTIMATORS`: a config may name
them then. `changes` makes other changes while a cell of recipe.py runs.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp

from rvq_jax.quantize import fsq, gradients, vector_quantizer
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.replacement import replace_codes
from rvq_jax.quantize.vector_quantizer import VectorQuantizer


def scaled(e, q):
  """lambda g: the rescaling of the rotation without the rotation."""
  return gradients.straight_through(gradients.geometry(e, q).scale * e, q)


def radial(e, q):
  """R^T g + u (u.g - v.g): straight-through along e, rotation elsewhere."""
  g = gradients.geometry(e, q)
  along = jnp.sum(g.u * e, axis=-1, keepdims=True)
  turned = gradients.rotate(e, q, rescale=False)
  return gradients.straight_through(turned + (g.u - g.v) * along, q)


def tangential(e, q):
  """g + u (v.g - u.g): rotation along e, straight-through elsewhere."""
  g = gradients.geometry(e, q)
  along = jnp.sum(g.u * e, axis=-1, keepdims=True)
  return gradients.straight_through(e + (g.v - g.u) * along, q)


def cdf_bins(x, levels):
  """Bins of FSQ that are equally likely for Gaussian x (iFSQ).

  Instead of `fsq._bound`: L sigmoid(1.6 x) - 1/2 - floor(L/2), for rounding.
  """
  levels = jnp.asarray(levels, jnp.float32)[None]
  return levels * jax.nn.sigmoid(1.6 * x) - 0.5 - levels // 2


_update = VectorQuantizer._update


def least_count(layer, *args):
  """A replaced code starts with the least count that is not dead.

  Instead of `VectorQuantizer._update`, which gives it the mean count N/K.
  """

  def replace(*args, expected_size, **options):
    size = layer.dead_code_threshold * expected_size
    return replace_codes(*args, expected_size=size, **options)

  with mock.patch.object(vector_quantizer, 'replace_codes', replace):
    return _update(layer, *args)


CHANGES = {
  'cdf': (fsq, '_bound', cdf_bins),
  'least': (VectorQuantizer, '_update', least_count),
}
"""Part of a cell's name -> what it replaces."""


@contextlib.contextmanager
def changes(cell):
  """Makes the changes that parts of a cell's name ask for."""
  with contextlib.ExitStack() as stack:
    for name in CHANGES.keys() & set(cell.split('+')):
      stack.enter_context(mock.patch.object(*CHANGES[name]))
    yield


TRIED = {f.__name__: f for f in (scaled, radial, tangential)}
ESTIMATORS.update(
  {name: lambda e, q, f=f, **_: f(e, q) for name, f in TRIED.items()}
)
