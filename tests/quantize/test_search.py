"""The search against brute force in float64, its sharding and its memory."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rvq_jax.quantize.search import centering, nearest_codes, tile_sizes

SHAPES = [(1, 1, 1), (1, 5, 2), (5, 1, 3), (7, 1031, 4), (513, 40, 3)]
SHAPES += [(1030, 2050, 17), (512, 90, 1)]


def brute_force(e, codes):
  """argmin_k sum((e - c_k)^2) in float64; NumPy takes the lowest index."""
  e, codes = np.float64(e), np.float64(codes)
  return np.array([np.argmin(((row - codes) ** 2).sum(1)) for row in e])


def draw(n, k, dim, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  e = rng.standard_normal((n, dim)) * scale
  return np.float32(e), np.float32(rng.standard_normal((k, dim)) * scale)


def wrong(e, codes):
  ids = np.asarray(nearest_codes(e, codes))
  assert ids.dtype == np.int32
  return int(np.sum(ids != brute_force(e, codes)))


def clusters(kind):
  """128 codes of norm about 1e4, 0.1 apart; rows a tenth of that off them."""
  rng = np.random.default_rng(3)
  u = rng.standard_normal((128, 64))
  u /= np.linalg.norm(u, axis=1, keepdims=True)
  base = {
    'one cloud': np.repeat(1e4 * u[:1], 128, 0),
    'a line': 1e4 * u[:1] + 0.1 * np.arange(128)[:, None] * u[1:2],
  }[kind]
  codes = base + (0.07 * u if kind != 'a line' else 0)
  e = codes + 0.01 * np.roll(u, 1, axis=0)
  return np.float32(e), np.float32(codes)


@pytest.mark.parametrize('n,k,dim', SHAPES)
def test_ids_equal_brute_force(n, k, dim):
  assert wrong(*draw(n, k, dim)) == 0


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.sampled_from([(1, 3), (2, 4), (40, 1), (41, 4)]), st.integers(0, 2**16)
)
def test_ties_go_to_the_lowest_index(shape, seed):
  rng = np.random.default_rng(seed)
  codes = np.float32(rng.integers(-2, 3, shape))
  e = np.float32(rng.integers(-2, 3, (30, shape[1])))
  assert wrong(e, codes) == 0


def test_ties_across_tiles_go_to_the_lowest_index():
  e, codes = draw(600, 700, 33)
  assert wrong(e, np.concatenate([codes] * 4)) == 0


def test_integer_ties_stay_ties_away_from_the_origin():
  rng = np.random.default_rng(0)
  codes = rng.integers(1000, 1004, (1500, 6))
  assert wrong(rng.integers(1000, 1004, (900, 6)), codes) == 0


@pytest.mark.parametrize(
  'scale', [1e-30, 1e-19, 1e-12, 1e-6, 1e6, 1e12, 1e19, 1e30, 3e37]
)
def test_scale_of_the_vectors_does_not_matter(scale):
  e, codes = draw(100, 300, 8)
  e, codes = e / 3, codes / 3
  scaled = np.float32(e * scale), np.float32(codes * scale)
  assert wrong(*scaled) == 0


@pytest.mark.parametrize('e_scale,code_scale', [(1e30, 1e-30), (1e-30, 1e30)])
def test_rows_and_codes_of_very_different_norm(e_scale, code_scale):
  e, codes = draw(100, 300, 8)
  e, codes = np.float32(e * e_scale), np.float32(codes * code_scale)
  score = np.float64(e) @ np.float64(codes).T  # the distance rounds off
  score -= 0.5 * np.sum(np.float64(codes) ** 2, axis=1)
  np.testing.assert_array_equal(nearest_codes(e, codes), score.argmax(1))


@pytest.mark.parametrize('kind', ['one cloud', 'a line'])
def test_close_codes_with_a_common_offset_are_told_apart(kind):
  assert wrong(*clusters(kind)) == 0


def test_padding_never_wins_when_every_score_is_hugely_negative():
  e, codes = draw(7, 1031, 4)
  codes = codes * np.float32(1e18)
  assert wrong(-e, codes) == 0


def test_non_finite_row_gets_a_valid_id_and_spoils_no_other():
  e, codes = draw(200, 70, 5)
  spoilt = e.copy()
  spoilt[3], spoilt[5, 2], spoilt[7, 1] = np.nan, np.inf, -np.inf
  ids = np.asarray(nearest_codes(spoilt, codes))
  assert ids.min() >= 0 and ids.max() < 70
  others = np.delete(np.arange(200), [3, 5, 7])
  np.testing.assert_array_equal(ids[others], brute_force(e, codes)[others])


def test_non_finite_code_is_never_chosen():
  e, codes = draw(200, 70, 5)
  expected = brute_force(e, np.delete(codes, [0, 9, 69], 0))
  codes[0], codes[9, 1], codes[69, 4] = np.nan, np.inf, -np.inf
  kept = np.delete(np.arange(70), [0, 9, 69])
  np.testing.assert_array_equal(nearest_codes(e, codes), kept[expected])


def test_only_non_finite_codes_give_id_zero():
  ids = nearest_codes(np.ones((4, 2)), np.full((3, 2), np.nan))
  np.testing.assert_array_equal(ids, np.zeros(4))


def test_no_rows_give_no_ids():
  ids = nearest_codes(jnp.zeros((0, 3)), jnp.zeros((2, 3)))
  assert ids.shape == (0,) and ids.dtype == jnp.int32


def test_id_does_not_depend_on_the_other_rows():
  e, codes = draw(700, 300, 16)
  moved = np.concatenate([e[:1], e[1:] * 1e12])
  assert nearest_codes(moved, codes)[0] == nearest_codes(e, codes)[0]


def test_bfloat16_is_cast_up_first():
  e, codes = (jnp.asarray(x, jnp.bfloat16) for x in draw(300, 500, 24))
  assert wrong(e, codes) == 0


def test_vmap_and_scan_give_the_same_ids():
  e, codes = draw(3 * 600, 200, 6)
  expected = brute_force(e, codes).reshape(3, 600)
  e = jnp.asarray(e).reshape(3, 600, 6)
  mapped = jax.vmap(nearest_codes, (0, None))(e, codes)
  scanned = jax.lax.scan(lambda _, x: (0, nearest_codes(x, codes)), 0, e)[1]
  np.testing.assert_array_equal(mapped, expected)
  np.testing.assert_array_equal(scanned, expected)


def test_no_gradient_passes_through_ids():
  e, codes = draw(30, 20, 6)

  def loss(e, codes):
    return jnp.sum(jnp.take(codes, nearest_codes(e, codes), axis=0))

  grad_e, grad_codes = jax.grad(loss, (0, 1))(e, codes)
  counts = np.bincount(brute_force(e, codes), minlength=20)
  np.testing.assert_array_equal(grad_e, np.zeros_like(e))
  np.testing.assert_array_equal(grad_codes, np.repeat(counts[:, None], 6, 1))


def over_devices():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  return mesh, functools.partial(NamedSharding, mesh)


def test_sharded_rows_are_searched_without_collectives():
  _, sharding = over_devices()
  e, codes = draw(4096, 1500, 8)
  rows = jax.device_put(e, sharding(PartitionSpec('data')))
  codes = jax.device_put(codes, sharding(PartitionSpec()))
  compiled = nearest_codes.lower(rows, codes).compile()
  collective = r'all-gather|all-reduce|all-to-all|collective-permute'
  assert not re.search(collective, compiled.as_text())
  ids = compiled(rows, codes)
  assert ids.sharding.spec == PartitionSpec('data')
  np.testing.assert_array_equal(ids, brute_force(e, codes))


def test_shard_map_gives_the_same_ids():
  mesh, _ = over_devices()
  e, codes = draw(8 * 600, 100, 4)
  specs = (PartitionSpec('data'), PartitionSpec())
  find = jax.shard_map(
    nearest_codes, mesh=mesh, in_specs=specs, out_specs=specs[0]
  )
  np.testing.assert_array_equal(jax.jit(find)(e, codes), brute_force(e, codes))


def test_temporaries_stay_under_64_mib():
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  args = shape((16384, 256)), shape((16384, 256))
  memory = nearest_codes.lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_tiles_fit_the_arrays_and_pad_little(backend, n, k):
  rows, codes = tile_sizes(n, k, backend)
  assert 1 <= rows <= n and 1 <= codes <= k
  blocks = -(-n // rows)
  assert blocks * rows - n < 8 * blocks


def test_codebook_around_the_origin_is_not_moved():
  codes = jnp.asarray(draw(1, 5000, 16)[1])
  shift, scale = jax.jit(centering)(codes)
  np.testing.assert_array_equal(shift, np.zeros(16))
  assert scale == 1


@pytest.mark.parametrize(
  'e_shape,code_shape,message',
  [
    ((2, 3), (4, 5), r'\(2, 3\) and \(4, 5\)'),
    ((2, 1, 3), (4, 3), 'expects e'),
    ((2, 3), (0, 3), 'at least one code'),
  ],
)
def test_wrong_shapes_are_named(e_shape, code_shape, message):
  with pytest.raises(ValueError, match=message):
    nearest_codes(jnp.zeros(e_shape), jnp.zeros(code_shape))


def test_the_tiles_are_those_of_the_platform_that_is_compiled_for():
  shapes = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (1024, 4096))
  traced = nearest_codes.trace(*shapes)
  for platform, tile in (('cpu', '1024x512'), ('cuda', '4096x1024')):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (product,) = re.findall(r'stablehlo.dot_general.*', text)
    assert product.endswith(f'-> tensor<{tile}xf32>')


def test_every_backend_multiplies_in_float32():
  shape = jax.ShapeDtypeStruct((64, 8), jnp.float32)
  for platform in ('cpu', 'cuda', 'tpu'):
    traced = nearest_codes.trace(shape, shape)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r'stablehlo.dot_general.*', text)
    assert products
    assert all('precision = [HIGHEST, HIGHEST]' in line for line in products)
