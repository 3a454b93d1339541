"""One jitted program per quantizer and use, which the tests here share."""

import functools

import jax
import numpy as np

FAST_COMPILE = {'xla_backend_optimization_level': 1}


def random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(
  jax.jit, static_argnames=('layer', 'train'), compiler_options=FAST_COMPILE
)
def _init(layer, z, train):
  return layer.init(jax.random.key(0), z, train=train)


@functools.partial(jax.jit, static_argnames='layer')
def _train(layer, variables, z, mask, key):
  out, updates = layer.apply(
    variables,
    z,
    train=True,
    mask=mask,
    mutable=['codebook'],
    rngs={'codebook': key},
  )
  return out, variables | updates


@functools.partial(jax.jit, static_argnames='layer')
def _evaluate(layer, variables, z):
  return layer.apply(variables, z, mutable=['codebook', 'params'])


# One signature each: a default argument left out would be another program.
def init(layer, z, train=True):
  return _init(layer, z, train)


def train(layer, variables, z, mask=None, seed=0):
  """The output and the variables after a training step."""
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _train(layer, variables, z, mask, jax.random.key(seed))


def evaluate(layer, variables, z):
  """The output of an evaluation, and the collections that it may write."""
  return _evaluate(layer, variables, z)


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


@functools.partial(jax.jit, static_argnames='layer')
def encode(layer, variables, z):
  return layer.apply(variables, z, method='ids')


def assert_same_bits(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
