"""Which codes dead ones join: those with the most vectors, or most error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax import Codebook
from rvq_jax.quantize.replacement import replace_codes

K, N = 4, 4000
rng = np.random.default_rng(0)
CODES = 100.0 * np.eye(K, 3, dtype=np.float32)
# Code 0: many near vectors; code 1: few far ones; 2 and 3 are dead.
IDS = (np.arange(N) % 8 == 0).astype(np.int32)
SPREAD = np.where(IDS == 0, 0.1, 1.0)[:, None]
E = (CODES[IDS] + SPREAD * rng.normal(size=(N, 3))).astype(np.float32)
SIZES = np.array([3500.0, 500.0, 0.0, 0.0], np.float32)


@functools.partial(jax.jit, static_argnames=('split_by', 'axis_name'))
def parents(key, e, ids, mask, split_by, axis_name=None):
  """Codes that two dead ones were put beside."""
  book, _ = replace_codes(
    Codebook.create(CODES, SIZES),
    jnp.arange(K) >= 2,
    key,
    e,
    ids,
    expected_size=1.0,
    split_by=split_by,
    axis_name=axis_name,
    mask=mask,
  )
  distance = jnp.sum((book.embedding[2:, None] - CODES[None, :2]) ** 2, -1)
  return jnp.argmin(distance, axis=1)


@pytest.mark.parametrize('split_by', ['count', 'distortion'])
def test_donors_are_drawn_by_their_weight(split_by):
  mask = np.ones(N, bool)
  keys = jax.random.split(jax.random.key(0), 400)
  drawn = jax.vmap(lambda key: parents(key, E, IDS, mask, split_by)[0])(keys)
  weights = SIZES[:2].astype(float)
  if split_by == 'distortion':
    error = ((E - CODES[IDS]) ** 2).sum(1)
    weights *= [error[IDS == k].mean() for k in (0, 1)]
  mass = weights * np.bincount(IDS)
  share = mass[1] / mass.sum()
  deviation = np.sqrt(share * (1 - share) / 400)
  assert abs(np.mean(np.asarray(drawn)) - share) < 4 * deviation + 1e-3


def test_distortion_is_that_of_all_devices():
  # One device holds code 0 alone, the others what is left.
  order = np.argsort(IDS, kind='stable')
  mask = np.arange(N) % 3 > 0
  e, ids, mask = E[order], IDS[order], mask[order]
  parts = [x.reshape(4, -1, *x.shape[1:]) for x in (e, ids, mask)]
  for seed in range(5):
    key = jax.random.key(seed)
    one = parents(key, e, ids, mask, 'distortion')
    many = jax.vmap(
      lambda *part: parents(key, *part, 'distortion', 'data'),  # noqa: B023
      axis_name='data',
    )(*parts)
    np.testing.assert_array_equal(many, np.broadcast_to(one, (4, 2)))
