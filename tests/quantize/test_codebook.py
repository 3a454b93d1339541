"""The EMA update and the replacement of codes against NumPy loops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rvq_jax import Codebook, ema_update
from rvq_jax.quantize.replacement import draw_rows, fill_codebook, replace_codes

update = jax.jit(ema_update, static_argnames=('decay', 'eps', 'axis_name'))


def make(size=7, dim=3, seed=0):
  rng = np.random.default_rng(seed)
  return Codebook(
    embedding=np.float32(rng.normal(size=(size, dim))),
    cluster_size=np.float32(rng.uniform(0.1, 3, size)),
    embedding_sum=np.float32(rng.normal(size=(size, dim))),
  )


def batch(n=40, size=7, dim=3, seed=1):
  rng = np.random.default_rng(seed)
  e = rng.normal(size=(n, dim)).astype(np.float32)
  return e, rng.integers(0, size, n).astype(np.int32)


def oracle(book, e, ids, decay, eps):
  """Equation 6 as a loop over codes, float64."""
  size = len(book.cluster_size)
  n = np.asarray(book.cluster_size, np.float64).copy()
  m = np.asarray(book.embedding_sum, np.float64).copy()
  for k in range(size):
    mine = e[ids == k].astype(np.float64)
    n[k] = decay * n[k] + (1 - decay) * len(mine)
    m[k] = decay * m[k] + (1 - decay) * mine.sum(0)
  codes = np.empty_like(m)
  for k in range(size):
    codes[k] = book.embedding[k]
    if n[k] > 0:
      codes[k] = m[k] / ((n[k] + eps) / (n.sum() + size * eps) * n.sum())
  return codes, n, m


def assert_book(book, codes, n, m, rtol=1e-5):
  np.testing.assert_allclose(book.cluster_size, n, rtol=rtol)
  np.testing.assert_allclose(book.embedding_sum, m, rtol=rtol, atol=1e-6)
  np.testing.assert_allclose(book.embedding, codes, rtol=rtol, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
  st.integers(0, 10**6),
  st.sampled_from([0.0, 0.5, 0.99, 1.0]),
  st.sampled_from([1e-5, 0.1]),
)
def test_ema_update_equals_the_loop(seed, decay, eps):
  book, (e, ids) = make(seed=seed), batch(seed=seed + 1)
  ids = np.minimum(ids, 4)  # codes 5 and 6 get nothing
  got = update(book, e, ids, decay=decay, eps=eps)
  assert_book(got, *oracle(book, e, ids, decay, eps))


def test_ema_update_without_vectors_keeps_created_codes():
  codes = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  book = Codebook.create(codes, 0.25)
  for _ in range(50):
    book = update(
      book, np.zeros((0, 2), np.float32), np.zeros(0, np.int32), decay=0.99
    )
  np.testing.assert_allclose(book.embedding, codes, rtol=1e-4)


def test_ema_update_of_an_empty_codebook_keeps_its_codes():
  codes = np.ones((5, 2), np.float32)
  book = update(
    Codebook.create(codes, 0.0),
    np.zeros((0, 2), np.float32),
    np.zeros(0, np.int32),
    decay=0.9,
  )
  np.testing.assert_array_equal(book.embedding, codes)


@pytest.mark.parametrize('start', [4.0, 1e-4, 0.0])
def test_a_code_that_no_vector_chooses_stays_where_it_is(start):
  e, ids = np.ones((4, 2), np.float32), np.zeros(4, np.int32)

  @jax.jit
  def run(size):
    book = Codebook.create([[1.0, 0.0], [3.0, 4.0]], size)
    return jax.lax.fori_loop(
      0, 3000, lambda _, book: ema_update(book, e, ids, decay=0.99), book
    )

  book = run(np.float32([4, start]))
  np.testing.assert_allclose(book.embedding, [[1, 1], [3, 4]], rtol=2e-3)


def test_a_code_of_size_zero_jumps_to_the_first_vectors_that_choose_it():
  book = Codebook.create([[1.0, 0.0], [3.0, 4.0]], np.float32([4, 0]))
  e = np.float32([[2, 4], [4, 6]])
  book = update(book, e, np.int32([1, 1]), decay=0.99)
  np.testing.assert_allclose(np.asarray(book.embedding)[1], [3, 5], rtol=2e-3)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_never_reaches_the_codebook(bad):
  book, (e, ids) = make(), batch()
  spoilt = e.copy()
  spoilt[3, 1] = bad
  got = update(book, spoilt, ids, decay=0.9)
  keep = np.arange(len(e)) != 3
  assert_book(got, *oracle(book, e[keep], ids[keep], 0.9, 1e-5))


def test_masked_rows_do_not_count():
  book, (e, ids) = make(), batch()
  mask = np.arange(len(e)) % 3 > 0
  got = update(book, e, ids, decay=0.9, mask=mask)
  assert_book(got, *oracle(book, e[mask], ids[mask], 0.9, 1e-5))


def on_devices(count, function, *arguments):
  """Runs function with axis 'data' mapped over rows of the arguments."""
  mesh = jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices('cpu')[:count],
  )
  return jax.jit(
    jax.shard_map(
      function, mesh=mesh, in_specs=P('data'), out_specs=P(), check_vma=True
    )
  )(*arguments)


@pytest.mark.parametrize('count', [1, 2, 4, 8])
def test_ema_update_sums_over_devices(count):
  book, (e, ids) = make(), batch()
  got = on_devices(
    count,
    lambda e, ids: ema_update(book, e, ids, decay=0.9, axis_name='data'),
    e,
    ids,
  )
  assert_book(got, *oracle(book, e, ids, 0.9, 1e-5))


@jax.jit
def replace(book, dead, e, ids, mask=None):
  key = jax.random.key(3)
  return replace_codes(book, dead, key, e, ids, expected_size=0.5, mask=mask)


def splits(book, e, ids, split_fraction=0.2):
  """Where a code may go: next to the code of each vector."""
  parent = np.asarray(book.embedding)[ids]
  return parent + np.float32(split_fraction) * (e - parent)


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


def test_dead_codes_go_to_codes_in_proportion_to_their_size():
  book, (e, ids) = make(), batch(n=400)
  size = np.float32([9, 3, 1, 1, 1, 1, 0])
  book = book.replace(cluster_size=size)
  dead = np.arange(7) == 6
  draw = jax.jit(
    jax.vmap(
      lambda key: replace_codes(book, dead, key, e, ids, expected_size=1.0)[
        0
      ].embedding[6]
    )
  )
  placed = draw(jax.random.split(jax.random.key(0), 4000))
  parents = ids[origin(placed, splits(book, e, ids))]
  share = np.bincount(parents, minlength=7) / 4000
  weight = np.asarray(size)[ids]
  want = [weight[ids == k].sum() / weight.sum() for k in range(7)]
  np.testing.assert_allclose(share, want, atol=0.03)


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
  rows, _ = jax.jit(functools.partial(draw_rows, count=9))(
    jax.random.key(0), e, weight=weight
  )
  noise = np.asarray(jax.random.gumbel(jax.random.key(0), (len(e),)))
  expected = np.argsort(-(np.log(weight) + noise))[:9]
  np.testing.assert_array_equal(rows, e[expected])


def test_what_the_draw_gathers_does_not_grow_with_the_batch():
  devices = jax.devices('cpu')[:8]
  assert len(devices) == jax.device_count() == 8
  rows = NamedSharding(Mesh(devices, 'data'), P('data'))

  def gathered(n):
    shapes = [
      jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
      for shape in ((n, 3), (n,))
    ]
    program = jax.jit(
      lambda e, weight: draw_rows(jax.random.key(0), e, 9, weight=weight)
    ).lower(*shapes)
    text = program.compile().as_text()
    return sorted(re.findall(r'= (\S+?)(?:\{\S*)? all-gather\(', text))

  small, large = gathered(8 * 64), gathered(8 * 512)
  assert small == large == ['f32[72]'], (small, large)


@pytest.mark.parametrize('count', [2, 4, 8])
def test_devices_draw_the_same_rows_as_one(count):
  e, ids = batch()
  weight = 0.1 + ids.astype(np.float32)
  mask = np.arange(40) < 7  # fewer than are asked for

  def draw(e, weight, mask, axis_name=None):
    return draw_rows(
      jax.random.key(0), e, 9, weight=weight, mask=mask, axis_name=axis_name
    )

  one, usable = jax.jit(draw)(e, weight, mask)
  many, usable_there = on_devices(
    count, functools.partial(draw, axis_name='data'), e, weight, mask
  )
  assert usable.sum() == 7
  np.testing.assert_array_equal(one, many)
  np.testing.assert_array_equal(usable, usable_there)
