"""What the package does not have, tried in docs/gradients.md.

Importing this module adds its estimators to `ESTIMATORS`: a config may name
them then. `changes` makes other changes while a cell of recipe.py runs.
"""

import contextlib
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize import fsq, gradients, multiscale, scales
from rvq_jax.quantize.base import direction_metrics
from rvq_jax.quantize.gradients import ESTIMATORS
from rvq_jax.quantize.vector_quantizer import VectorQuantizer
from rvq_jax.training import build


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


class PerScale(multiscale.MultiscaleQuantizer):
  """Multi-scale codes, each scale from a codebook of its own size.

  codebook_size is the sum of `sizes`; its ids do not decode.
  """

  sizes = ()

  @nn.compact
  def __call__(self, z, *, train=False, mask=None):
    """As `MultiscaleQuantizer`."""
    e, mask = self.inputs(z, mask)
    sides = self._checked_sides(z)
    phis = [
      self.param(f'phi_{i}', scales.identity_phi, e.shape[1])
      for i in range(min(scales.PHIS, len(sides)))
    ]
    grid = jax.lax.stop_gradient(multiscale._grid(e, z))
    valid, total = mask.reshape(grid.shape[:-1]), jnp.zeros_like(grid)
    names = 'decay', 'dead_code_threshold', 'split_by', 'split_fraction'
    options = {name: getattr(self, name) for name in names}
    parts, ids, counts = [], [], []
    for i, (side, size) in enumerate(zip(sides, self.sizes, strict=True)):
      rows, share = scales.pool(grid - total, valid, side, self.resize)
      layer = VectorQuantizer(size, name=f'scale_{i}', **options)
      out = layer(rows, train=train, mask=share > 0)
      q = jax.lax.stop_gradient(out.quantized)
      total += multiscale._addend(phis, q, i, sides, self.resize)
      loss = self.loss(e, total.reshape(e.shape), mask, self.codebook_weight)
      parts.append(loss)
      ids.append(out.ids)
      counts.append(out.counts)
    total, counts = total.reshape(e.shape), jnp.concatenate(counts)
    metrics = parts[-1][1] | diversity(counts)
    metrics |= direction_metrics(e, total, mask)
    return self.finish(
      z,
      self.estimate(e, total, None, mask),
      jnp.concatenate(ids, 1),
      sum(loss for loss, _ in parts) / len(parts),
      counts,
      metrics,
    )


CHANGES = {'cdf': (fsq, '_bound', cdf_bins)}
"""Part of a cell's name -> what it replaces."""


@contextlib.contextmanager
def changes(cell):
  """Makes the changes that parts of a cell's name ask for."""
  numbers = dict(part.split('=') for part in cell.split('+') if '=' in part)
  with contextlib.ExitStack() as stack:
    if 'sizes' in numbers:
      PerScale.sizes = tuple(map(int, numbers['sizes'].split('-')))
      patch = mock.patch.object(build, 'quantizer_class', lambda _: PerScale)
      stack.enter_context(patch)
    for name in CHANGES.keys() & set(cell.split('+')):
      stack.enter_context(mock.patch.object(*CHANGES[name]))
    yield


TRIED = {f.__name__: f for f in (scaled, radial, tangential)}
ESTIMATORS.update(
  {name: lambda e, q, f=f, **_: f(e, q) for name, f in TRIED.items()}
)
