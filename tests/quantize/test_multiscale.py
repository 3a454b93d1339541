"""Codes on grids of growing side, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rvq_jax import MultiscaleQuantizer, rotate, sharding
from rvq_jax.quantize import scales
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE

SIDES, K, D, N, T = (1, 2, 3), 8, 3, 3, 14
BETA = 0.25
Z = np.random.default_rng(0).normal(size=(8, N, N, D)).astype(np.float32)
LAYER = MultiscaleQuantizer(
  K, sides=SIDES, decay=0.8, dead_code_threshold=0.0, commitment_weight=BETA
)


@functools.partial(jax.jit, static_argnames='layer')
def _step(layer, variables, z, mask):
  out, updates = layer.apply(
    variables, z, train=True, mask=mask, mutable=['codebook']
  )
  return out, variables | updates


def step(layer, variables, z=Z, mask=None):
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _step(layer, variables, z, mask)


@functools.partial(jax.jit, static_argnames='layer')
def _evaluate(layer, variables, z):
  return layer.apply(variables, z, mutable=['codebook', 'params'])


def evaluate(layer, variables, z=Z):
  return _evaluate(layer, variables, z)[0]


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


@functools.cache
def start(layer=LAYER):
  init = functools.partial(layer.init, train=True)
  return jax.jit(init, compiler_options=RUNS_ONCE)(jax.random.key(0), Z)


@functools.cache
def trained():
  """Filled codes, and a phi of each group that is not the identity."""
  variables = start()
  for _ in range(2):
    _, variables = step(LAYER, variables)
  rng = np.random.default_rng(1)
  return variables | {
    'params': jax.tree.map(
      lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)),
      variables['params'],
    )
  }


def area(x, side):
  """Means over areas of x [n, n, D], on a grid that all sides divide."""
  fine = x.repeat(side, 0).repeat(side, 1)
  cells = fine.reshape(side, len(x), side, len(x), -1)
  return cells.mean((1, 3)).reshape(side * side, -1)


def bicubic(q, side, n):
  """Keys' interpolation, a = -1/2, of q [side^2, D] at n x n positions."""

  def keys(t):
    t = abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, (-0.5 * t + 2.5) * t**2 - 4 * t + 2
    return near if t <= 1 else far if t < 2 else 0.0

  weights = np.array(
    [
      [keys((i + 0.5) * side / n - 0.5 - j) for j in range(side)]
      for i in range(n)
    ]
  )
  weights /= weights.sum(1, keepdims=True)
  q = q.reshape(side, side, -1)
  return np.einsum('ia,jb,abd->ijd', weights, weights, q)


def phi(params, x):
  """(x + conv3x3(x)) / 2 by a loop over the taps."""
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  y = np.zeros_like(x) + params['bias']
  for i in range(3):
    for j in range(3):
      y += padded[i : i + len(x), j : j + len(x)] @ params['kernel'][i, j]
  return (x + y) / 2


def oracle(variables, images):
  """Rows and ids of all scales, and the sum after each of them."""
  variables = jax.tree.map(np.float64, variables)
  codes = variables['codebook']['embedding']
  rows, ids, sums = [], [], []
  for z in np.float64(images):
    total = np.zeros_like(z)
    for number, side in enumerate(SIDES):
      e = area(z - total, side)
      own = ((e[:, None] - codes[None]) ** 2).sum(-1).argmin(1)
      params = variables['params'][f'phi_{number}']
      total = total + phi(params, bicubic(codes[own], side, N))
      rows.append(e)
      ids.append(own)
      sums.append(total)
  rows, ids = (
    np.concatenate(x).reshape(len(images), T, -1) for x in (rows, ids)
  )
  return rows, ids[..., 0], np.reshape(sums, (-1, len(SIDES), N, N, D))


def test_each_scale_codes_what_the_ones_before_leave():
  variables = trained()
  out = evaluate(LAYER, variables)
  _, ids, sums = oracle(variables, Z)
  np.testing.assert_array_equal(out.ids, ids)
  np.testing.assert_allclose(out.quantized, sums[:, -1], atol=1e-5)
  np.testing.assert_array_equal(
    out.counts, np.bincount(ids.ravel(), minlength=K)
  )
  errors = ((Z[:, None] - sums) ** 2).mean((0, 2, 3, 4))
  np.testing.assert_allclose(out.loss, (1 + BETA) * errors.mean(), rtol=1e-5)
  first = 0
  for number, (error, side) in enumerate(zip(errors, SIDES, strict=True), 1):
    own = ids[:, first : first + side**2]
    first += side**2
    p = np.bincount(own.ravel(), minlength=K) / own.size
    want = {
      'usage': (p > 0).sum() / min(K, own.size),
      'perplexity': np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()),
      'quantization_error': error,
    }
    for name, value in want.items():
      got = out.metrics[f'{name}_{number}']
      np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=name)
  assert (
    out.metrics['quantization_error'] == out.metrics['quantization_error_3']
  )


def test_ids_decode_to_the_forward_pass_and_those_of_the_first_scales_to_less():
  variables = trained()
  out = evaluate(LAYER, variables)
  np.testing.assert_array_equal(
    decode(LAYER, variables, out.ids), out.quantized
  )
  _, _, sums = oracle(variables, Z)
  for number, end in enumerate((1, 5)):
    got = decode(LAYER, variables, out.ids[:, :end])
    np.testing.assert_allclose(got, sums[:, number], atol=1e-5)


@pytest.mark.parametrize(
  'layer',
  [
    LAYER.clone(sides=(2, 3), code_dim=5, ema=False, dead_code_threshold=0.9),
    pytest.param(LAYER.clone(sides=(1, 3)), marks=pytest.mark.slow),
    pytest.param(LAYER.clone(sides=(3,)), marks=pytest.mark.slow),
  ],
  ids=['projected and learned', 'two scales', 'one scale'],
)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_every_layer_decodes_its_ids_bit_exactly(layer, dtype):
  _, variables = step(layer, start(layer))
  out = evaluate(layer, variables, Z.astype(dtype))
  assert out.quantized.dtype == dtype and out.quantized.shape == Z.shape
  got = decode(layer, variables, out.ids).astype(dtype)
  np.testing.assert_array_equal(got, out.quantized)


def test_the_first_term_trains_phi_and_the_second_the_encoder():
  variables = trained()

  @jax.jit
  def gradients(params, z):
    loss = lambda p, z: LAYER.apply(variables | {'params': p}, z).loss  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(params, z)

  of_params, of_z = gradients(variables['params'], Z)
  _, _, sums = oracle(variables, Z)
  want = 2 * BETA * (Z[:, None] - sums).mean(1) / Z.size
  np.testing.assert_allclose(of_z, want, atol=1e-6)
  for name, index in (('phi_0', (1, 1, 0, 2)), ('phi_2', (0, 2, 1, 1))):

    def first_term(shift, name=name, index=index):
      params = {n: dict(p) for n, p in variables['params'].items()}
      kernel = np.float64(params[name]['kernel'])
      kernel[index] += shift
      params[name]['kernel'] = kernel
      moved = variables | {'params': params}
      _, ids, sums = oracle(moved, Z)
      # Codes that change their id would jump.
      np.testing.assert_array_equal(ids, oracle(variables, Z)[1])
      return ((Z[:, None] - sums) ** 2).mean()

    slope = (first_term(1e-6) - first_term(-1e-6)) / 2e-6
    got = of_params[name]['kernel'][index]
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-6)
    assert abs(slope) > 1e-4


def test_the_estimator_is_one_rotation_onto_the_sum():
  variables = trained()
  g = np.random.default_rng(1).normal(size=Z.shape).astype(np.float32)

  @jax.jit
  def gradients(z):
    q = LAYER.apply(variables, z).quantized
    through = jax.grad(
      lambda z: jnp.sum(LAYER.apply(variables, z).quantized * g)
    )
    return through(z), jax.grad(lambda z: jnp.sum(rotate(z, q) * g))(z)

  got, expected = gradients(Z)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(got) - g).max() > 0.1  # not straight-through


def test_the_moving_average_weighs_tokens_by_the_area_that_they_cover():
  variables = trained()
  _, after = step(LAYER, variables)
  rows, ids, _ = oracle(variables, Z)
  old = variables['codebook']
  area = np.concatenate([np.full(s * s, T / (3 * s * s)) for s in SIDES])
  area = np.tile(area, len(Z))  # each scale counts for T / 3 an image
  counts = np.bincount(ids.ravel(), area, minlength=K)
  sums = np.zeros((K, D))
  np.add.at(sums, ids.ravel(), area[:, None] * rows.reshape(-1, D))
  for name, new in (('cluster_size', counts), ('embedding_sum', sums)):
    want = 0.8 * np.float64(old[name]) + 0.2 * new
    np.testing.assert_allclose(after['codebook'][name], want, atol=1e-4)
  assert np.any(after['codebook']['embedding'] != old['embedding'])


def test_the_first_batch_fills_the_codebook_from_every_scale():
  sides = (2, 3)
  layer = LAYER.clone(sides=sides, codebook_size=8 * 13, decay=1.0)
  _, variables = step(layer, start(layer))
  rows = []
  for z in np.float64(Z):
    for side in sides:
      rows.append(area(z, side))
      z = z - bicubic(rows[-1], side, N)
  rows, codes = np.concatenate(rows), variables['codebook']['embedding']
  distance = np.linalg.norm(rows[:, None] - codes[None], axis=-1)
  assert distance.min(0).max() < 1e-5 and distance.min(1).max() < 1e-5
  np.testing.assert_allclose(variables['codebook']['cluster_size'], 1, 1e-6)


def test_the_first_codes_are_drawn_from_all_scales_alike():
  """Of 8 x 16 tokens of the finest scale as many as of the eight of 2x2."""
  layer = LAYER.clone(sides=(2, 4), codebook_size=40, decay=1.0)
  z = np.abs(np.random.default_rng(0).normal(size=(8, 4, 4, D)))
  z *= np.where(np.arange(4) % 2, 1, -1)[:, None]
  variables = start(layer.clone(sides=(2, N)))  # the same on any grid
  _, variables = step(layer, variables, np.float32(z))
  coarse = np.concatenate([area(np.float64(x), 2) for x in z])
  codes = variables['codebook']['embedding']
  distance = np.linalg.norm(coarse[:, None] - codes[None], axis=-1)
  assert 16 < (distance.min(0) < 1e-5).sum() < 24  # by numbers: 13


def test_evaluation_and_init_leave_the_codebook_and_freeze_phi_too():
  assert not np.any(start()['codebook']['cluster_size'])
  variables, frozen = trained(), LAYER.clone(freeze=True)
  _, after = _evaluate(LAYER, variables, Z)
  out, fixed = step(frozen, variables)
  # (1 + BETA) MSE without the codebook's term.
  whole = evaluate(LAYER, variables).loss
  np.testing.assert_allclose(out.loss, whole * BETA / (1 + BETA), rtol=1e-6)
  for kept in (after, fixed):
    jax.tree.map(
      np.testing.assert_array_equal, kept['codebook'], variables['codebook']
    )
  gradient = jax.jit(
    jax.grad(lambda p: frozen.apply(variables | {'params': p}, Z).loss)
  )(variables['params'])
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_a_dead_code_joins_the_others():
  layer, variables = LAYER.clone(sides=(2, 3)), trained()
  layer = layer.clone(dead_code_threshold=0.5)
  book = jax.tree.map(np.array, variables['codebook'])
  book['embedding'][3], book['cluster_size'][3] = 100.0, 0.0
  book['embedding_sum'][3] = 0.0
  out, after = step(layer, variables | {'codebook': book})
  assert out.metrics['replaced_codes'] >= 1
  assert np.linalg.norm(after['codebook']['embedding'][3]) < 10
  assert after['codebook']['cluster_size'][3] == pytest.approx(8 * 13 / K)


def test_masked_positions_count_nowhere():
  variables = trained()
  mask = np.random.default_rng(2).random(Z.shape[:-1]) < 0.7
  mask[0], mask[1] = False, True
  wild = np.where(mask[..., None], Z, 1e4).astype(np.float32)
  one, after_one = step(LAYER, variables, Z, mask)
  two, after_two = step(LAYER, variables, wild, mask)
  np.testing.assert_array_equal(one.counts, two.counts)
  np.testing.assert_array_equal(one.loss, two.loss)
  jax.tree.map(
    np.testing.assert_array_equal, after_one['codebook'], after_two['codebook']
  )
  # The finest scale has a token per position, the coarsest one per image.
  usable = mask.sum() + 7
  assert usable < np.sum(one.counts) < 8 * T
  whole = step(LAYER, variables)[0]
  np.testing.assert_array_equal(one.ids[1], whole.ids[1])


def test_a_position_that_is_not_finite_spoils_its_own_image():
  variables, spoilt = trained(), Z.copy()
  spoilt[2, 1, 2, 0] = np.nan
  out, after = step(LAYER, variables, spoilt)
  whole = step(LAYER, variables)[0]
  others = np.arange(8) != 2
  np.testing.assert_array_equal(out.ids[others], whole.ids[others])
  assert np.isfinite(out.quantized).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


@pytest.mark.parametrize(
  'route', ['jit', pytest.param('shard_map', marks=pytest.mark.slow)]
)
def test_devices_agree_with_one(route):
  layer = LAYER.clone(sides=(1, 3), codebook_size=20, dead_code_threshold=0.7)
  mesh = sharding.data_mesh(jax.devices('cpu'))
  rows, everywhere = sharding.by_rows(mesh), sharding.replicated(mesh)
  axis = None if route == 'jit' else 'data'
  mask = np.arange(8 * N * N).reshape(8, N, N) % 11 > 0

  def step(layer, key, variables, z, mask):
    out, updates = layer.apply(
      variables,
      z,
      train=True,
      mask=mask,
      mutable=['codebook'],
      rngs={'codebook': key},
    )
    loss = (
      out.loss if layer.axis_name is None else jax.lax.pmean(out.loss, 'data')
    )
    return variables | updates, out.ids, loss, out.counts

  many = functools.partial(step, layer.clone(axis_name=axis))
  if route == 'shard_map':
    many = jax.shard_map(
      many,
      mesh=mesh,
      in_specs=(P(), P(), P('data'), P('data')),
      out_specs=(P(), P('data'), P(), P()),
    )
  shardings = everywhere, everywhere, rows, rows
  many = jax.jit(many, in_shardings=shardings)
  single = jax.jit(functools.partial(step, layer))
  got, one = [jax.device_put(start(layer), everywhere)], [start(layer)]
  for key in jax.random.split(jax.random.key(0), 3):
    got, one = many(key, got[0], Z, mask), single(key, one[0], Z, mask)
  np.testing.assert_array_equal(got[1], one[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *(got[0], one[0]),
  )
  np.testing.assert_allclose(got[2], one[2], rtol=1e-5)
  np.testing.assert_array_equal(got[3], one[3])


@pytest.mark.parametrize(
  ('grid', 'tokens'), [(4, 30), (8, 155), (16, 680), (7, 140), (1, 1)]
)
def test_sides_of_a_grid_grow_up_to_it(grid, tokens):
  sides = scales.default_sides(grid)
  assert sides[-1] == grid and list(sides) == sorted(set(sides))
  offsets = scales.token_offsets(sides)
  assert offsets[-1] == tokens and len(offsets) == len(sides) + 1


@pytest.mark.parametrize(('grid', 'side'), [(8, 3), (16, 13), (5, 5), (7, 1)])
def test_areas_are_weighted_by_what_they_cover(grid, side):
  x = np.random.default_rng(0).normal(size=(1, grid, grid, 2))
  mask = np.ones((1, grid, grid), bool)
  pool = jax.jit(scales.pool, static_argnames='side')
  e, valid = pool(x.astype(np.float32), mask, side=side)
  np.testing.assert_allclose(e[0], area(x[0], side), atol=1e-5)
  assert valid.all()


def test_areas_are_means_over_the_positions_in_the_mask():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(8, 8, 2)), rng.random((8, 8)) < 0.5
  mask[:3, :3] = False
  pool = jax.jit(scales.pool, static_argnames='side')
  e, valid = pool(x[None].astype(np.float32), mask[None], side=3)
  share = area(np.float64(mask[..., None]), 3)
  want = area(np.where(mask[..., None], x, 0.0), 3) / share.clip(1e-9)
  np.testing.assert_allclose(e[0], want, atol=1e-5)
  np.testing.assert_array_equal(valid[0], share[:, 0] > 0)
  assert not valid[0, 0] and valid[0, 1:].all()


@pytest.mark.parametrize(('side', 'grid'), [(3, 8), (13, 16), (1, 7), (5, 5)])
def test_codes_are_interpolated_by_the_bicubic_kernel(side, grid):
  q = np.random.default_rng(0).normal(size=(1, side * side, 2))
  expand = jax.jit(scales.expand, static_argnames='grid')
  got = expand(q.astype(np.float32), grid=grid)
  np.testing.assert_allclose(got[0], bicubic(q[0], side, grid), atol=1e-5)


@pytest.mark.parametrize(
  ('layer', 'shape', 'message'),
  [
    (LAYER, (2, 5, 5, 3), 'up to that of the grid, 5, got .1, 2, 3'),
    (LAYER, (2, 4, 8, 3), r'square grid .* got \[2, 4, 8, 3\]'),
    (LAYER, (4, 4, 3), 'square grid'),
    (LAYER.clone(sides=(2, 1, 4)), (2, 4, 4, 3), 'sides that grow'),
    (LAYER.clone(sides=(1, 4, 4)), (2, 4, 4, 3), 'sides that grow'),
    (LAYER.clone(sides=(0, 4)), (2, 4, 4, 3), 'sides: expected integers'),
    (LAYER.clone(cosine=True), (2, 4, 4, 3), 'Multiscale.*cosine=False'),
    (LAYER.clone(estimator='dynamic_ste'), (2, 4, 4, 3), 'several codes'),
  ],
)
def test_what_cannot_be_is_refused(layer, shape, message):
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize('tokens', [0, 2, 13, 15])
def test_ids_of_a_part_of_a_scale_are_refused(tokens):
  with pytest.raises(ValueError, match=r'T one of \[1, 5, 14\]'):
    LAYER.apply(
      start(), np.zeros((2, tokens), np.int32), method='codes_from_ids'
    )


def test_ids_without_sides_are_refused():
  with pytest.raises(ValueError, match='expected its argument sides'):
    LAYER.clone(sides=None).apply(
      start(), np.zeros((2, T), np.int32), method='codes_from_ids'
    )
