"""The EMA update, the draw and the splitting of codes against NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from layer_programs import random

from rvq_jax import Codebook, ema_update, sharding
from rvq_jax.quantize.replacement import draw_rows, fill_codebook, replace_codes

update = jax.jit(ema_update, static_argnames=('decay', 'eps', 'axis_name'))


def make(seed=0, size=7, dim=3):
  codes, sums = random(seed, 2, size, dim)
  sizes = np.random.default_rng(seed).uniform(0.1, 3, size)
  return Codebook(codes, np.float32(sizes), sums)


def batch(n=40, seed=1):
  ids = np.random.default_rng(seed).integers(0, 7, n)
  return random(seed, n, 3), ids.astype(np.int32)


def oracle(book, e, ids, decay, eps):
  """Equation 6 as a loop over vectors, float64."""
  sizes, sums = np.float64(book.cluster_size), np.float64(book.embedding_sum)
  sizes, sums = decay * sizes, decay * sums
  for k, x in zip(ids, e, strict=True):
    sizes[k] += 1 - decay
    sums[k] += (1 - decay) * x
  total = sizes.sum()
  smoothed = (sizes + eps) / (total + len(sizes) * eps) * total
  moved = sums / smoothed[:, None]
  return np.where(sizes[:, None] > 0, moved, book.embedding), sizes, sums


def assert_book(book, codes, sizes, sums):
  np.testing.assert_allclose(book.cluster_size, sizes, rtol=1e-5)
  np.testing.assert_allclose(book.embedding_sum, sums, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(book.embedding, codes, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
  st.integers(0, 10**6),
  st.sampled_from([0.0, 0.5, 0.99, 1.0]),
  st.sampled_from([1e-5, 0.1]),
)
def test_ema_update_equals_the_loop(seed, decay, eps):
  book, (e, ids) = make(seed), batch(seed=seed + 1)
  ids = np.minimum(ids, 4)  # codes 5 and 6 get nothing
  got = update(book, e, ids, decay=decay, eps=eps)
  assert_book(got, *oracle(book, e, ids, decay, eps))


@pytest.mark.parametrize(('size', 'steps'), [(0.25, 50), (0.0, 1)])
def test_ema_update_without_vectors_keeps_the_codes(size, steps):
  codes = random(0, 5, 2)
  book = Codebook.create(codes, size)
  for _ in range(steps):
    book = update(book, codes[:0], np.zeros(0, np.int32), decay=0.99)
  np.testing.assert_allclose(book.embedding, codes, rtol=1e-4 * size)


@pytest.mark.parametrize('start', [4.0, 1e-4, 0.0])
def test_a_code_that_no_vector_chooses_stays_where_it_is(start):
  e, ids = np.ones((4, 2), np.float32), np.zeros(4, np.int32)

  step = lambda _, book: ema_update(book, e, ids, decay=0.99)  # noqa: E731
  book = Codebook.create([[1.0, 0.0], [3.0, 4.0]], np.float32([4, start]))
  book = jax.lax.fori_loop(0, 3000, step, book)
  np.testing.assert_allclose(book.embedding, [[1, 1], [3, 4]], rtol=2e-3)


def test_a_code_of_size_zero_jumps_to_the_first_vectors_that_choose_it():
  book = Codebook.create([[1.0, 0.0], [3.0, 4.0]], np.float32([4, 0]))
  e = np.float32([[2, 4], [4, 6]])
  book = update(book, e, np.int32([1, 1]), decay=0.99)
  np.testing.assert_allclose(np.asarray(book.embedding)[1], [3, 5], rtol=2e-3)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, None])
def test_rows_that_are_not_finite_or_masked_never_reach_the_codebook(bad):
  book, (e, ids) = make(), batch()
  keep = np.arange(len(e)) % 3 > 0
  want = oracle(book, e[keep], ids[keep], 0.9, 1e-5)
  if bad is not None:
    e[~keep, 1] = bad
  mask = keep if bad is None else None
  assert_book(update(book, e, ids, decay=0.9, mask=mask), *want)


def on_devices(count, function, *arguments):
  """Runs function with axis 'data' mapped over rows of the arguments."""
  mesh = sharding.data_mesh(jax.devices('cpu')[:count])
  specs = {'in_specs': P('data'), 'out_specs': P()}
  return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(*arguments)


@pytest.mark.parametrize('count', [1, 2, 4, 8])
def test_ema_update_sums_over_devices(count):
  book, (e, ids) = make(), batch()
  step = functools.partial(ema_update, book, decay=0.9, axis_name='data')
  got = on_devices(count, step, e, ids)
  assert_book(got, *oracle(book, e, ids, 0.9, 1e-5))


@jax.jit
def replace(book, dead, e, ids, mask=None):
  key = jax.random.key(3)
  return replace_codes(book, dead, key, e, ids, expected_size=0.5, mask=mask)


def splits(book, e, ids):
  """Where a code may go: next to the code of each vector."""
  parent = np.asarray(book.embedding)[ids]
  return parent + np.float32(0.2) * (e - parent)


def origin(codes, candidates):
  """Index of the candidate that each code equals."""
  distance = np.abs(np.asarray(codes)[:, None] - candidates[None]).max(-1)
  assert (distance.min(1) < 1e-6).all()
  return distance.argmin(1)


def test_only_dead_codes_are_replaced_and_their_averages_with_them():
  book, (e, ids) = make(), batch()
  dead = np.array([0, 1, 0, 0, 1, 1, 0], bool)
  got, replaced = replace(book, dead, e, ids)
  assert replaced == 3
  for new, old in zip(*map(jax.tree.leaves, (got, book)), strict=True):
    np.testing.assert_array_equal(np.asarray(new)[~dead], old[~dead])
  moved = np.asarray(got.embedding)[dead]
  assert len(set(origin(moved, splits(book, e, ids)))) == 3
  np.testing.assert_array_equal(np.asarray(got.cluster_size)[dead], 0.5)
  np.testing.assert_allclose(np.asarray(got.embedding_sum)[dead], 0.5 * moved)


def test_with_few_vectors_the_least_used_codes_go_first():
  book, (e, ids) = make(), batch(n=2)
  got, replaced = replace(book, np.ones(7, bool), e, ids)
  assert replaced == 2
  changed = np.any(np.asarray(got.embedding) != book.embedding, axis=1)
  least = np.argsort(book.cluster_size)[:2]
  np.testing.assert_array_equal(np.flatnonzero(changed), np.sort(least))


def test_invalid_rows_are_never_drawn():
  book, (e, ids) = make(), batch()
  e[:20] = np.nan
  mask = np.arange(40) < 25
  got, replaced = replace(book, np.ones(7, bool), e, ids, mask=mask)
  assert replaced == 5
  changed = np.any(np.asarray(got.embedding) != book.embedding, axis=1)
  candidates = splits(book, e, ids)[20:25]
  moved = np.asarray(got.embedding)[changed]
  assert len(set(origin(moved, candidates))) == 5


def test_filling_puts_codes_onto_different_vectors():
  e, _ = batch()
  empty = Codebook.create(np.zeros((7, 3)), 0.0)
  fill = jax.jit(functools.partial(fill_codebook, expected_size=2.0))
  got = jax.device_get(fill(empty, jax.random.key(0), e))
  assert len(set(origin(got.embedding, e))) == 7
  np.testing.assert_array_equal(got.cluster_size, 2.0)
  np.testing.assert_allclose(got.embedding_sum, 2 * got.embedding)


def test_the_draw_takes_the_largest_of_weight_and_noise():
  e, ids = batch()
  weight = 0.1 + ids.astype(np.float32)
  key = jax.random.key(0)
  draw = jax.jit(functools.partial(draw_rows, count=9))
  rows, _ = draw(key, e, weight=weight)
  noise = np.asarray(jax.random.gumbel(key, (len(e),)))
  expected = np.argsort(-(np.log(weight) + noise))[:9]
  np.testing.assert_array_equal(rows, e[expected])


def test_what_the_draw_gathers_does_not_grow_with_the_batch():
  mesh = sharding.data_mesh(jax.devices('cpu'))
  assert mesh.size == jax.device_count() == 8
  row = functools.partial(
    jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=sharding.by_rows(mesh)
  )
  draw = jax.jit(lambda e, w: draw_rows(jax.random.key(0), e, 9, weight=w))

  def gathered(n):
    text = draw.lower(row((n, 3)), row((n,))).compile().as_text()
    return sorted(re.findall(r'= (\S+?)(?:\{\S*)? all-gather\(', text))

  small, large = gathered(8 * 64), gathered(8 * 512)
  assert small == large == ['f32[72]'], (small, large)


@pytest.mark.parametrize('count', [2, 4, 8])
def test_devices_draw_the_same_rows_as_one(count):
  e, ids = batch()
  weight = 0.1 + ids.astype(np.float32)
  mask = np.arange(40) < 7  # fewer than are asked for
  draw = functools.partial(draw_rows, jax.random.key(0), count=9)

  def shares(e, weight, mask):
    return draw(e, weight=weight, mask=mask, axis_name='data')

  one, usable = jax.jit(draw)(e, weight=weight, mask=mask)
  many, usable_there = on_devices(count, shares, e, weight, mask)
  assert usable.sum() == 7
  np.testing.assert_array_equal(one, many)
  np.testing.assert_array_equal(usable, usable_there)


K, N = 4, 4000
CODES = 100.0 * np.eye(K, 3, dtype=np.float32)
# Code 0: many near vectors; code 1: few far ones; 2 and 3 are dead.
IDS = (np.arange(N) % 8 == 0).astype(np.int32)
SPREAD = np.where(IDS == 0, 0.1, 1.0)[:, None]
E = np.float32(CODES[IDS] + SPREAD * random(0, N, 3))
SIZES = np.array([3500.0, 500.0, 0.0, 0.0], np.float32)


@functools.partial(jax.jit, static_argnames=('split_by', 'axis_name'))
def parents(key, e, ids, mask, split_by, axis_name=None):
  """Codes that two dead ones were put beside."""
  book, dead = Codebook.create(CODES, SIZES), jnp.arange(K) >= 2
  options = {'split_by': split_by, 'axis_name': axis_name, 'mask': mask}
  book, _ = replace_codes(book, dead, key, e, ids, expected_size=1.0, **options)
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
  # One device holds only code 0, the others the rest.
  order = np.argsort(IDS, kind='stable')
  mask = np.arange(N) % 3 > 0
  e, ids, mask = E[order], IDS[order], mask[order]
  parts = [x.reshape(4, -1, *x.shape[1:]) for x in (e, ids, mask)]
  for seed in range(5):
    key = jax.random.key(seed)
    one = parents(key, e, ids, mask, 'distortion')
    share = functools.partial(parents, key, split_by='distortion')
    share = functools.partial(share, axis_name='data')
    many = jax.vmap(share, axis_name='data')(*parts)
    np.testing.assert_array_equal(many, np.broadcast_to(one, (4, 2)))
