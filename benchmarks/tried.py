"""Estimators that the package does not have, tried in docs/gradients.md.

Importing this module adds them to `ESTIMATORS`: a config may name them then.
"""

import jax.numpy as jnp

from rvq_jax.quantize import gradients
from rvq_jax.quantize.gradients import ESTIMATORS


def scaled(e, q):
  """lambda g: the rescaling of the rotation without the rotation."""
  return gradients.straight_through(gradients.geometry(e, q).scale * e, q)


def grown(e, q):
  """max(lambda, 1) R^T g: rescaling that only enlarges."""
  scale = jnp.maximum(gradients.geometry(e, q).scale, 1.0)
  turned = gradients.rotate(e, q, rescale=False)
  return gradients.straight_through(scale * turned, q)


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


def blend(e, q):
  """(g + R^T g)/2."""
  turned = gradients.rotate(e, q, rescale=False)
  return gradients.straight_through((e + turned) / 2, q)


TRIED = {f.__name__: f for f in (scaled, grown, radial, tangential, blend)}
ESTIMATORS.update(
  {name: lambda e, q, f=f, **_: f(e, q) for name, f in TRIED.items()}
)
