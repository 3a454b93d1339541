"""LPIPS beside NumPy in float64, on narrow networks of random weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.models.lpips import _halve, _pool, distance

# Convolutions of torchvision's `features`: kernel, stride, padding, the window
# of a pooling of stride 2 in front, and whether LPIPS compares the output.
_CONV, _COMPARED, _POOLED = (3, 1, 1, 0, 0), (3, 1, 1, 0, 1), (3, 1, 1, 2, 0)
VGG = [_CONV, _COMPARED, _POOLED, _COMPARED, *3 * [_POOLED, _CONV, _COMPARED]]
ALEX = [(11, 4, 2, 0, 1), (5, 1, 2, 3, 1), (3, 1, 1, 3, 1), *2 * [_COMPARED]]
NETS = pytest.mark.parametrize('layers', [VGG, ALEX], ids=['vgg', 'alex'])


def make_weights(layers, seed=0):
  rng, heads = np.random.default_rng(seed), itertools.count()
  weights, inputs = {}, 3
  for i, (size, *_, compared) in enumerate(layers):
    width = 4 + i % 3
    scale = (2 / size**2 / inputs) ** 0.5
    kernel = rng.normal(0, scale, (size, size, inputs, width))
    weights[f'kernel_{i:02d}'] = kernel.astype(np.float32)
    weights[f'bias_{i:02d}'] = rng.normal(0, 0.3, width).astype(np.float32)
    if compared:
      weights[f'head_{next(heads)}'] = rng.random(width).astype(np.float32)
    inputs = width
  return weights


def windows(x, size, stride):
  view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return view[:, ::stride, ::stride]  # [B, H, W, C, size, size]


def oracle(layers, weights, x, y):
  shift, scale = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
  both = (np.concatenate([x, y]).astype(np.float64) - shift) / scale
  total, heads = 0.0, itertools.count()
  for i, (size, stride, pad, pool, compared) in enumerate(layers):
    if pool:
      both = windows(both, pool, 2).max((-1, -2))
    padded = np.pad(both, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    kernel = weights[f'kernel_{i:02d}'].astype(np.float64)
    both = np.einsum('bhwcij,ijcf->bhwf', windows(padded, size, stride), kernel)
    both = np.maximum(both + weights[f'bias_{i:02d}'], 0)
    if compared:
      norm = np.sqrt((both**2).sum(-1, keepdims=True)) + 1e-10
      a, b = np.split(both / norm, 2)
      total += ((a - b) ** 2 @ weights[f'head_{next(heads)}']).mean((1, 2))
  return total


def make_images(count=2, seed=1):
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (2, count, 37, 46, 3)).astype(np.float32)


@NETS
@pytest.mark.parametrize(
  ('dtype', 'name', 'tolerance'),
  [(jnp.float32, 'f32', 1e-5), (jnp.bfloat16, 'bf16', 0.03)],
)
def test_distance_equals_the_definition(layers, dtype, name, tolerance):
  weights, (x, y) = make_weights(layers), make_images()
  expected = oracle(layers, weights, x, y)
  assert expected.min() > 0.05
  measure = jax.jit(lambda *a: distance(*a, dtype=dtype))
  text = str(jax.make_jaxpr(measure)(weights, x, y))
  results = [t for t in text.splitlines() if '= conv_general_dilated' in t]
  assert results and all(f':{name}[' in line for line in results)
  got = measure(weights, x, y)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, rtol=tolerance)


@NETS
def test_gradients_equal_differences_of_the_definition(layers):
  weights, (x, y) = make_weights(layers), make_images(count=1)
  gradient = jax.jit(jax.grad(lambda *a: distance(*a).sum(), (1, 2)))
  direction = make_images(count=1, seed=2)
  got = np.vdot(gradient(weights, x, y), direction)
  step = 1e-6 * direction.astype(np.float64)
  high = oracle(layers, weights, x + step[0], y + step[1])
  low = oracle(layers, weights, x - step[0], y - step[1])
  np.testing.assert_allclose(got, (high - low).sum() / 2e-6, rtol=1e-3)


def test_halves_have_the_gradient_of_a_pool():
  rng = np.random.default_rng(0)
  x = np.float32(rng.integers(-2, 3, (2, 9, 8, 3)))  # with equal values
  found = [jax.vjp(pool, x) for pool in (_halve, lambda x: _pool(x, 2))]
  np.testing.assert_array_equal(*(y for y, _ in found))
  g = np.float32(rng.normal(size=(2, 4, 4, 3)))
  np.testing.assert_array_equal(*(back(g)[0] for _, back in found))


def test_features_whose_squares_underflow_have_a_finite_gradient():
  weights, (x, y) = make_weights(ALEX), make_images()
  weights = {
    name: np.full_like(array, 1e-25 if 'bias' in name else 0)
    for name, array in weights.items()
  }
  gradient = jax.jit(jax.value_and_grad(lambda *a: distance(*a).sum(), 2))
  value, gradient = gradient(weights, x, y)
  assert value == 0 and not np.any(gradient)


def test_images_of_bytes_have_the_distance_of_floats():
  x, y = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
  weights = make_weights(ALEX)
  want = distance(weights, *(z / np.float32(127.5) - 1 for z in (x, y)))
  np.testing.assert_allclose(distance(weights, x, y), want, rtol=1e-6)
  with pytest.raises(ValueError, match='uint8 or float'):
    distance(weights, x.astype(np.int64), y)


@pytest.mark.parametrize(
  ('x', 'y'),
  [
    ((1, 32, 32, 3), (1, 33, 32, 3)),
    *(2 * (x,) for x in [(2, 31, 64, 3), (2, 64, 31, 3), (64, 64, 3)]),
  ],
)
def test_other_pairs_than_images_of_one_size_are_refused(x, y):
  with pytest.raises(ValueError, match='two batches .* least 32 pixels, got'):
    distance(make_weights(ALEX), np.zeros(x), np.zeros(y))
