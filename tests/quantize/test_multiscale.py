"""Codes on grids of growing side, against loops in float64."""

import functools

import jax
import numpy as np
import pytest
from layer_programs import (
  assert_same_bits,
  decode,
  encode,
  evaluate,
  init,
  moved,
  nearest,
  random,
  train,
)

from rvq_jax import MultiscaleQuantizer
from rvq_jax.quantize import scales

SIDES, K, D, N, T = (1, 2, 3), 8, 3, 3, 14
BETA = 0.25
Z = random(0, 8, N, N, D)
LAYER = MultiscaleQuantizer(
  K, sides=SIDES, decay=0.8, dead_code_threshold=0.0, commitment_weight=BETA
)


@functools.cache
def start(layer=LAYER):
  return init(layer, Z)


@functools.cache
def trained():
  """Filled codes, and a phi of each group that is not the identity."""
  variables = start()
  for _ in range(2):
    _, variables = train(LAYER, variables, Z)
  return variables | {'params': moved(variables['params'])}


def area(x, side, resize='keys'):
  """Means over areas of x [n, n, D], on a grid that all sides divide."""
  if resize == 'torch':  # torch.nn.functional.adaptive_avg_pool2d
    starts = [i * len(x) // side for i in range(side)]
    ends = [-((-i * len(x)) // side) for i in range(1, side + 1)]
    cells = [slice(*x) for x in zip(starts, ends, strict=True)]
    return np.array([x[a, b].mean((0, 1)) for a in cells for b in cells])
  fine = x.repeat(side, 0).repeat(side, 1)
  cells = fine.reshape(side, len(x), side, len(x), -1)
  return cells.mean((1, 3)).reshape(side * side, -1)


def bicubic(q, side, n, resize='keys'):
  """Bicubic interpolation of q [side^2, D] at n x n positions.

  Keys' a = -1/2, divided by the sum of the weights; PyTorch's a = -3/4, and
  beyond the edge the cell at the edge.
  """
  a, beyond = (-0.5, 0) if resize == 'keys' else (-0.75, 2)

  def kernel(t):
    t = abs(t)
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, t**3 - 5 * t**2 + 8 * t - 4
    return near if t <= 1 else a * far if t < 2 else 0.0

  weights = np.zeros((n, side))
  for i in range(n):
    at = (i + 0.5) * side / n - 0.5
    for j in range(-beyond, side + beyond):
      weights[i, min(max(j, 0), side - 1)] += kernel(at - j)
  if resize == 'keys':
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


def oracle(variables, images, resize='keys'):
  """Rows and ids of all scales, and the sum after each of them."""
  variables = jax.tree.map(np.float64, variables)
  codes = variables['codebook']['embedding']
  rows, ids, sums = [], [], []
  for z in np.float64(images):
    total = np.zeros_like(z)
    for number, side in enumerate(SIDES):
      rows.append(area(z - total, side, resize))
      ids.append(nearest(rows[-1], codes))
      params = variables['params'][f'phi_{number}']
      total = total + phi(params, bicubic(codes[ids[-1]], side, N, resize))
      sums.append(total)
  rows, ids = (
    np.concatenate(x).reshape(len(images), T, -1) for x in (rows, ids)
  )
  return rows, ids[..., 0], np.reshape(sums, (-1, len(SIDES), N, N, D))


@pytest.mark.parametrize('resize', scales.RESIZES)
def test_each_scale_codes_the_residual_of_the_ones_before(resize):
  variables, layer = trained(), LAYER.clone(resize=resize)
  out, _ = evaluate(layer, variables, Z)
  _, ids, sums = oracle(variables, Z, resize)
  assert_same_bits(decode(layer, variables, out.ids), out.quantized)
  assert_same_bits(encode(layer, variables, Z), out.ids)
  np.testing.assert_array_equal(out.ids, ids)
  np.testing.assert_allclose(out.quantized, sums[:, -1], atol=1e-5)
  counts = np.bincount(ids.ravel(), minlength=K)
  np.testing.assert_array_equal(out.counts, counts)
  errors = ((Z[:, None] - sums) ** 2).mean((0, 2, 3, 4))
  np.testing.assert_allclose(out.loss, (1 + BETA) * errors.mean(), rtol=1e-5)
  parts = np.split(ids, [1, 5], axis=1)
  for number, (error, part) in enumerate(zip(errors, parts, strict=True), 1):
    p = np.bincount(part.ravel(), minlength=K) / part.size
    want = {
      'usage': (p > 0).sum() / min(K, part.size),
      'perplexity': np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()),
      'quantization_error': error,
    }
    for name, value in want.items():
      got = out.metrics[f'{name}_{number}']
      np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(out.metrics['quantization_error'], error, 1e-5)


def test_ids_decode_to_the_forward_pass_and_those_of_the_first_scales_to_less():
  variables = trained()
  out, _ = evaluate(LAYER, variables, Z)
  assert_same_bits(decode(LAYER, variables, out.ids), out.quantized)
  _, _, sums = oracle(variables, Z)
  for number, end in enumerate((1, 5)):
    got = decode(LAYER, variables, out.ids[:, :end])
    np.testing.assert_allclose(got, sums[:, number], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('sides', [(1, 3), (3,)])
def test_few_scales_decode_their_ids_bit_exactly(sides):
  layer = LAYER.clone(sides=sides)
  _, variables = train(layer, start(layer), Z)
  out, _ = evaluate(layer, variables, Z)
  assert_same_bits(decode(layer, variables, out.ids), out.quantized)
  assert_same_bits(encode(layer, variables, Z), out.ids)


def test_the_first_term_trains_phi_and_the_second_the_encoder():
  variables = trained()

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradients(params, z):
    return LAYER.apply(variables | {'params': params}, z).loss

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


def test_the_moving_average_weighs_tokens_by_the_area_that_they_cover():
  variables = trained()
  _, after = train(LAYER, variables, Z)
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


def test_a_token_weighs_by_the_valid_positions_that_it_covers():
  mask = np.zeros(Z.shape[:-1], bool)
  mask[0], mask[1, 0, 0] = True, True  # a whole image, and 1 of 9 positions
  variables = trained()
  _, after = train(LAYER, variables, Z, mask)
  old, new = (x['codebook']['cluster_size'] for x in (variables, after))
  weight = np.sum(new - 0.8 * np.float64(old)) / 0.2
  np.testing.assert_allclose(weight, T * (1 + 1 / 9), rtol=1e-5)


def distances(rows, variables):
  codes = variables['codebook']['embedding']
  return np.linalg.norm(rows[:, None] - codes[None], axis=-1)


@pytest.mark.parametrize(
  'resize', ['keys', pytest.param('torch', marks=pytest.mark.slow)]
)
def test_the_first_batch_fills_the_codebook_from_every_scale(resize):
  sides, same = (2, 3), {'decay': 1.0, 'resize': resize}
  layer = LAYER.clone(sides=sides, codebook_size=8 * 13, **same)
  _, variables = train(layer, start(layer), Z)
  rows = []
  for z in np.float64(Z):
    for side in sides:
      rows.append(area(z, side, resize))
      z = z - bicubic(rows[-1], side, N, resize)
  distance = distances(np.concatenate(rows), variables)
  assert distance.min(0).max() < 1e-5 and distance.min(1).max() < 1e-5
  np.testing.assert_allclose(variables['codebook']['cluster_size'], 1, 1e-6)


def test_the_first_codes_are_drawn_from_all_scales_alike():
  """Of 8 x 16 tokens of the finest scale as many as of the eight of 2x2."""
  layer = LAYER.clone(sides=(2, 4), codebook_size=40, decay=1.0)
  z = np.abs(np.random.default_rng(0).normal(size=(8, 4, 4, D)))
  z *= np.where(np.arange(4) % 2, 1, -1)[:, None]
  coarse = np.concatenate([area(np.float64(x), 2) for x in z])
  empty = start(layer.clone(sides=(2, N)))  # the same on any grid
  numbers = []
  for seed in range(4):
    _, variables = train(layer, empty, np.float32(z), seed=seed)
    numbers.append((distances(coarse, variables).min(0) < 1e-5).sum())
  assert 15 < np.mean(numbers) < 22, numbers  # weighted by token count: 8


def test_freeze_leaves_the_codebook_and_phi():
  variables, frozen = trained(), LAYER.clone(freeze=True)
  out, fixed = train(frozen, variables, Z)
  # (1 + BETA) MSE without the codebook's term.
  whole = evaluate(LAYER, variables, Z)[0].loss
  np.testing.assert_allclose(out.loss, whole * BETA / (1 + BETA), rtol=1e-6)
  assert_same_bits(fixed['codebook'], variables['codebook'])
  gradient = jax.jit(jax.grad(lambda v: frozen.apply(v, Z).loss))(variables)
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_a_dead_code_joins_the_others():
  layer = LAYER.clone(sides=(2, 3), dead_code_threshold=0.5)
  variables = trained()
  book = jax.tree.map(np.array, variables['codebook'])
  book['embedding'][3], book['cluster_size'][3] = 100.0, 0.0
  book['embedding_sum'][3] = 0.0
  out, after = train(layer, variables | {'codebook': book}, Z)
  assert out.metrics['replaced_codes'] >= 1
  assert np.linalg.norm(after['codebook']['embedding'][3]) < 10
  assert after['codebook']['cluster_size'][3] == pytest.approx(8 * 13 / K)


@pytest.mark.parametrize(
  ('grid', 'tokens'), [(4, 30), (8, 155), (16, 680), (7, 140), (1, 1)]
)
def test_sides_of_a_grid_grow_up_to_it(grid, tokens):
  sides = scales.default_sides(grid)
  assert sides[-1] == grid and list(sides) == sorted(set(sides))
  ends = np.cumsum(np.square(sides)).tolist()
  assert scales.token_offsets(sides) == [0, *ends] and ends[-1] == tokens


pool = jax.jit(scales.pool, static_argnames=('side', 'resize'))
RESIZED = pytest.mark.parametrize('resize', scales.RESIZES)
SHAPES = pytest.mark.parametrize(
  ('side', 'grid'), [(3, 8), (13, 16), (1, 7), (5, 5), (2, 3), (10, 13)]
)


@RESIZED
@SHAPES
def test_areas_are_weighted_by_what_they_cover(side, grid, resize):
  x, mask = random(0, 1, grid, grid, 2), np.ones((1, grid, grid), bool)
  e, valid = pool(x, mask, side=side, resize=resize)
  want = area(np.float64(x[0]), side, resize)
  np.testing.assert_allclose(e[0], want, atol=1e-5)
  np.testing.assert_array_equal(valid, 1)


@RESIZED
def test_areas_are_means_over_the_positions_in_the_mask(resize):
  x, mask = random(0, 8, 8, 2), random(1, 8, 8) < 0
  mask[:3, :3] = False
  # And the valid share of each area.
  e, valid = pool(x[None], mask[None], side=3, resize=resize)
  share = area(np.float64(mask[..., None]), 3, resize)
  want = area(np.where(mask[..., None], x, 0.0), 3, resize) / share.clip(1e-9)
  np.testing.assert_allclose(e[0], want, atol=1e-5)
  np.testing.assert_allclose(valid[0], share[:, 0], atol=1e-6)
  assert not valid[0, 0] and valid[0, 1:].all()


@RESIZED
@SHAPES
def test_codes_are_interpolated_by_the_bicubic_kernel(side, grid, resize):
  q = random(0, 1, side * side, 2)
  expand = jax.jit(scales.expand, static_argnames=('grid', 'resize'))
  got = expand(q, grid=grid, resize=resize)
  want = bicubic(q[0], side, grid, resize)
  np.testing.assert_allclose(got[0], want, atol=1e-5)


@pytest.mark.parametrize('grid', [1, 2, 4, 7, 16, 40])
def test_torch_resizes_as_the_field_says(grid):
  torch = pytest.importorskip('torch', reason='no torch: pip install torch')
  resize = torch.nn.functional.interpolate
  for side in range(1, grid + 1):
    down, up = (torch.eye(n).double()[None] for n in (grid, side))  # [1, C, n]
    down = resize(down[..., None], (side, 1), mode='area')[0, :, :, 0].T
    got = scales.area_weights(grid, side, 'torch')
    np.testing.assert_allclose(got, down, atol=1e-6)
    up = up[..., None].expand(-1, -1, -1, side)  # constant along the other
    up = resize(up, (grid, grid), mode='bicubic')[0, :, :, 0].T
    got = scales.bicubic_weights(side, grid, 'torch')
    np.testing.assert_allclose(got, up, atol=1e-6)


@pytest.mark.parametrize(
  ('resize', 'indices'),  # of torch: by models/quant.py of FoundationVision/VAR
  [
    *(('keys', x) for x in ([0], [0, 1, 2, 3], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3])),
    *(('torch', x) for x in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])),
    ('torch', [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # VAR's own ten scales
  ],
)
def test_scales_next_to_each_other_share_a_phi(resize, indices):
  assert scales.phi_indices(len(indices), resize) == indices
