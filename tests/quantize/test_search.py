"""The search against brute force in float64, and its compiled programs."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from layer_programs import nearest

from rvq_jax import sharding
from rvq_jax.quantize.search import (
  _search,
  centering,
  nearest_codes,
  search,
  tile_sizes,
)

COMPILE = """
import jax, jax.numpy as jnp
from benchmarks.absent_gpu import absent_gpu  # and tiles as on a GPU
from rvq_jax import nearest_codes
where = jax.sharding.SingleDeviceSharding(absent_gpu())
e, codes = (
  jax.ShapeDtypeStruct((n, 256), jnp.float32, sharding=where)
  for n in (32768, 16384)
)
nearest_codes.lower(e, codes).compile({'xla_gpu_autotune_level': 0})
"""
SHAPES = [(1, 1, 1), (1, 5, 2), (5, 1, 3), (7, 1031, 4), (513, 40, 3)]
SHAPES += [(1030, 2050, 17), (512, 90, 1)]


def draw(n, k, dim, scale=1.0):
  rng = np.random.default_rng(0)
  e = rng.standard_normal((n, dim)) * scale
  return np.float32(e), np.float32(rng.standard_normal((k, dim)) * scale)


def wrong(e, codes):
  ids = np.asarray(nearest_codes(e, codes))
  assert ids.dtype == np.int32
  return int(np.sum(ids != nearest(e, codes)))


def hard_cases():
  """name -> rows and codes."""
  e, codes = draw(600, 700, 33)
  rng = np.random.default_rng(3)
  integers = rng.integers(1000, 1004, (2400, 6))
  # 128 codes of norm about 1e4, 0.1 apart; rows a tenth of that off them.
  u = rng.standard_normal((128, 64))
  u /= np.linalg.norm(u, axis=1, keepdims=True)
  cloud = 1e4 * u[:1] + 0.07 * u
  line = 1e4 * u[:1] + 0.1 * np.arange(128)[:, None] * u[1:2]
  near = 0.01 * np.roll(u, 1, axis=0)
  few, many = draw(7, 1031, 4)
  return {
    'ties across tiles': (e, np.concatenate([codes] * 4)),
    'integer ties away from the origin': (integers[:900], integers[900:]),
    'one cloud far out': np.float32((cloud + near, cloud)),
    'a line far out': np.float32((line + near, line)),
    'hugely negative scores': (-few, many * np.float32(1e18)),
    'bfloat16': [jnp.asarray(x, jnp.bfloat16) for x in (e, codes)],
  }


@pytest.mark.parametrize('case', hard_cases())
def test_hard_cases_equal_brute_force(case):
  assert wrong(*hard_cases()[case]) == 0


@pytest.mark.parametrize('n,k,dim', SHAPES)
def test_ids_equal_nearest(n, k, dim):
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


def test_so_they_do_on_a_gpu():
  rng = np.random.default_rng(0)
  codes = np.float32(rng.integers(-2, 3, (300, 3)))
  find = functools.partial(_search, inner=False, backend='gpu')
  e = np.float32(rng.integers(-2, 3, (40, 3)))
  np.testing.assert_array_equal(jax.jit(find)(e, codes)[0], nearest(e, codes))


@pytest.mark.parametrize(
  'scale', [1e-30, 1e-19, 1e-12, 1e-6, 1e6, 1e12, 1e19, 1e30, 3e37]
)
def test_scale_of_the_vectors_does_not_matter(scale):
  e, codes = draw(100, 300, 8, scale=scale / 3)
  assert wrong(e, codes) == 0


@pytest.mark.parametrize('e_scale,code_scale', [(1e30, 1e-30), (1e-30, 1e30)])
def test_rows_and_codes_of_very_different_norm(e_scale, code_scale):
  e, codes = draw(100, 300, 8)
  e, codes = np.float32(e * e_scale), np.float32(codes * code_scale)
  score = np.float64(e) @ np.float64(codes).T  # the distance rounds off
  score -= 0.5 * np.sum(np.float64(codes) ** 2, axis=1)
  np.testing.assert_array_equal(nearest_codes(e, codes), score.argmax(1))


def clusters(groups, norm, spread, k, dim):
  """Rows and codes around a few centers; nothing is in common but these."""
  e, codes = draw(256, k, dim, scale=spread)
  centers = draw(1, groups, dim)[1]
  centers *= norm / np.linalg.norm(centers, axis=1, keepdims=True)
  return e + centers[np.arange(256) % groups], codes + centers[
    np.arange(k) % groups
  ]


@pytest.mark.parametrize(
  'shape', [(64, 16, 1e-3, 4096, 256), (4, 1e4, 1e-3, 128, 64)]
)
def test_row_with_another_code_is_ambiguous_and_within_the_bound(shape):
  e, codes = clusters(*shape)
  ids, ambiguous = search(e, codes)
  best = nearest(e, codes)
  assert np.sum(ids != best) > 5
  assert np.all(np.asarray(ambiguous)[ids != best])
  excess = [
    np.sum((np.float64(e) - np.float64(codes[of])) ** 2, axis=1)
    for of in (ids, best)
  ]
  e, codes = np.float64(e), np.float64(codes) - np.float64(codes).mean(0)
  norm = np.linalg.norm(codes[np.asarray(ids)], axis=1)
  bound = 2.0**-23 * (4 + shape[-1] ** 0.5) * norm * (norm + shape[1] * 1.1)
  assert np.all(excess[0] - excess[1] < bound)


@pytest.mark.parametrize('dim', [2, 16, 256])
def test_few_rows_are_ambiguous(dim):
  assert np.mean(search(*draw(1000, 1500, dim))[1]) < 0.002


def largest_inner(e, codes):
  """argmax_k e.c_k in float64; NumPy takes the lowest index."""
  return np.argmax(np.float64(e) @ np.float64(codes).T, axis=1)


def inner_cases():
  """name -> rows and codes."""
  e, codes = draw(600, 700, 33)
  integers = np.float32(np.random.default_rng(3).integers(-2, 3, (2400, 6)))
  few, one, many = (draw(*SHAPES[i]) for i in (0, 2, 5))
  cases = {'one of each': few, 'one code': one, 'several tiles': many}
  cases |= {
    f'norms of {norm:g}': (np.float32(e * norm), np.float32(codes * norm))
    for norm in (1e-30, 1e-12, 1e12, 3e37)
  }
  return cases | {
    'huge rows': (np.float32(e * 1e30), np.float32(codes * 1e-30)),
    'huge codes': (np.float32(e * 1e-30), np.float32(codes * 1e30)),
    'codes of many lengths': (e, codes * 2.0 ** (np.arange(700) % 40)[:, None]),
    'ties across tiles': (e, np.concatenate([codes] * 4)),
    'integer ties': (integers[:900], integers[900:]),
    'codes far from the origin': (e, codes + np.float32(100)),
    'bfloat16': [jnp.asarray(x, jnp.bfloat16) for x in (e, codes)],
  }


@pytest.mark.parametrize('case', inner_cases())
def test_largest_inner_product_equals_brute_force(case):
  e, codes = inner_cases()[case]
  ids, ambiguous = search(e, codes, inner=True)
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, largest_inner(e, codes))
  if 'ties' not in case:
    assert np.mean(ambiguous) < (0.2 if 'origin' in case else 0.02)


def test_row_with_another_larger_inner_product_is_ambiguous():
  e, codes = draw(2000, 2, 64)
  codes[1] = codes[0]
  codes[1, :2] += np.float32([1e4, -1e4])  # cancels in every product with e
  e[:, 1] = e[:, 0]
  ids, ambiguous = (np.asarray(x) for x in search(e, codes, inner=True))
  best = largest_inner(e, codes)
  assert np.sum(ids != best) > 5 and np.all(ambiguous[ids != best])


def test_what_is_not_finite_has_no_inner_product():
  e, codes = draw(200, 70, 5)
  e[3], e[5, 2], codes[0] = np.nan, -np.inf, np.nan
  codes[9, 1], codes[69, 4] = np.inf, -np.inf
  ids = np.asarray(search(e, codes, inner=True)[0])
  kept = np.delete(np.arange(70), [0, 9, 69])
  rows = np.delete(np.arange(200), [3, 5])
  want = kept[largest_inner(e[rows], codes[kept])]
  np.testing.assert_array_equal(ids[rows], want)
  assert 0 <= ids.min() and ids.max() < 70
  none = search(e[:4], np.full((3, 5), np.nan), inner=True)[0]
  np.testing.assert_array_equal(none, np.zeros(4))


def test_non_finite_row_gets_a_valid_id_and_spoils_no_other():
  e, codes = draw(200, 70, 5)
  spoilt = e.copy()
  spoilt[3], spoilt[5, 2], spoilt[7, 1] = np.nan, np.inf, -np.inf
  ids = np.asarray(nearest_codes(spoilt, codes))
  assert ids.min() >= 0 and ids.max() < 70
  others = np.delete(np.arange(200), [3, 5, 7])
  np.testing.assert_array_equal(ids[others], nearest(e, codes)[others])


def test_non_finite_code_is_never_chosen():
  e, codes = draw(200, 70, 5)
  expected = nearest(e, np.delete(codes, [0, 9, 69], 0))
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


def test_vmap_and_scan_give_the_same_ids():
  e, codes = draw(3 * 600, 200, 6)
  expected = nearest(e, codes).reshape(3, 600)
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
  counts = np.bincount(nearest(e, codes), minlength=20)
  np.testing.assert_array_equal(grad_e, np.zeros_like(e))
  np.testing.assert_array_equal(grad_codes, np.repeat(counts[:, None], 6, 1))


def test_sharded_rows_are_searched_without_collectives():
  mesh = sharding.data_mesh(jax.devices('cpu'))
  e, codes = draw(4096, 1500, 8)
  rows = jax.device_put(e, sharding.by_rows(mesh))
  codes = jax.device_put(codes, sharding.replicated(mesh))
  compiled = nearest_codes.lower(rows, codes).compile()
  collective = r'all-gather|all-reduce|all-to-all|collective-permute'
  assert not re.search(collective, compiled.as_text())
  ids = compiled(rows, codes)
  assert ids.sharding.spec == PartitionSpec('data')
  np.testing.assert_array_equal(ids, nearest(e, codes))


def test_shard_map_gives_the_same_ids():
  mesh = sharding.data_mesh(jax.devices('cpu'))
  e, codes = draw(8 * 600, 100, 4)
  specs = (PartitionSpec('data'), PartitionSpec())
  find = jax.shard_map(
    nearest_codes, mesh=mesh, in_specs=specs, out_specs=specs[0]
  )
  np.testing.assert_array_equal(jax.jit(find)(e, codes), nearest(e, codes))


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


@pytest.mark.parametrize(
  ('platform', 'tile'),
  [('cpu', '1024x512'), ('cuda', '4096x1024'), ('tpu', '4096x1024')],
)
def test_each_platform_has_its_tiles_and_multiplies_in_float32(platform, tile):
  shapes = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (1024, 4096))
  lowered = nearest_codes.trace(*shapes).lower(lowering_platforms=(platform,))
  (product,) = re.findall(r'stablehlo.dot_general.*', lowered.as_text())
  assert product.endswith(f'-> tensor<{tile}xf32>')
  assert 'precision = [HIGHEST, HIGHEST]' in product


@pytest.mark.slow
def test_no_score_comes_from_a_product_in_lower_precision(run_python, tmp_path):
  done = run_python(COMPILE, XLA_FLAGS=f'--xla_dump_to={tmp_path}')
  if 'needs the CUDA plugin' in done.stderr:
    pytest.skip('needs the CUDA plugin')
  assert done.returncode == 0, done.stderr
  kernels = ''.join(path.read_text() for path in tmp_path.glob('*.ptx'))
  assert 'fma.rn.f32' in kernels
  # Tensor cores multiply in TF32 or 16 bits: wgmma and mma instructions.
  assert re.findall(r'mma\.\S+', kernels) == []
  (program,) = tmp_path.glob('*nearest_codes*after_optimizations.txt')
  products = re.findall(r'(?:dot|custom-call)\(.*', program.read_text())
  products = [line for line in products if 'dot_general' in line]
  assert products
  for line in products:
    assert re.search(r'(?i)precision"?[=:][{\[]"?highest"?,"?highest', line)
