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


def step(layer, variables, z, mask, key):
  """The output and the variables after a training step."""
  options = {'mutable': ['codebook'], 'rngs': {'codebook': key}}
  out, updates = layer.apply(variables, z, train=True, mask=mask, **options)
  return out, variables | updates


_train = jax.jit(step, static_argnames='layer')


# One signature each: a default argument left out would be another program.
def init(layer, z, train=True):
  return _init(layer, z, train)


def train(layer, variables, z, mask=None, seed=0):
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _train(layer, variables, z, mask, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames='layer')
def evaluate(layer, variables, z):
  """The output of an evaluation, and the collections that it may write."""
  return layer.apply(variables, z, mutable=['codebook', 'params'])


def moved(params, size=0.1):
  """The parameters with noise: no bias is 0, and no phi the identity."""
  rng = np.random.default_rng(2)
  noise = lambda x: size * rng.normal(size=x.shape)  # noqa: E731
  return jax.tree.map(lambda x: np.float32(x + noise(x)), params)


def nearest(e, codes):
  """argmin_k sum((e - c_k)^2) in float64; NumPy takes the lowest index."""
  e, codes = np.float64(e), np.float64(codes)
  return np.array([np.argmin(((row - codes) ** 2).sum(1)) for row in e])


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


@functools.partial(jax.jit, static_argnames='layer')
def encode(layer, variables, z):
  return layer.apply(variables, z, method='ids')


def assert_same_bits(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
