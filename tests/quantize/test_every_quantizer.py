"""What holds for every quantizer: a table of layers and their properties."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import one_line
from jax.sharding import PartitionSpec as P
from layer_programs import (
  assert_same_bits,
  decode,
  encode,
  evaluate,
  init,
  moved,
  random,
  step,
  train,
)

from rvq_jax import (
  MultiscaleQuantizer,
  ProductQuantizer,
  ResidualQuantizer,
  VectorQuantizer,
  rotate,
  sharding,
)
from rvq_jax.quantize.fsq import FSQ
from rvq_jax.quantize.gumbel import GumbelQuantizer
from rvq_jax.quantize.simvq import SimVQ

K, SIDE = 16, 3
Z = random(0, 8, SIDE, SIDE, 6)
LAYERS = {
  'vq': VectorQuantizer(K),
  'vq learned': VectorQuantizer(K, ema=False),
  'vq cosine': VectorQuantizer(K, cosine=True, code_dim=4),
  'residual': ResidualQuantizer(K, depth=3),
  'residual learned': ResidualQuantizer(K, depth=2, ema=False, code_dim=4),
  'product': ProductQuantizer(K, heads=2),
  'product learned': ProductQuantizer(
    K, heads=2, ema=False, code_dim=4, cosine=True
  ),
  'multiscale': MultiscaleQuantizer(K, sides=(1, 2, SIDE)),
  'multiscale learned': MultiscaleQuantizer(
    K, sides=(2, SIDE), ema=False, code_dim=4
  ),
  'gumbel': GumbelQuantizer(K),
  'gumbel projected': GumbelQuantizer(K, code_dim=3),
  'fsq': FSQ(K),
  'fsq of odd levels': FSQ(15, levels=(5, 3)),
  'simvq': SimVQ(K),
  'simvq projected': SimVQ(K, code_dim=3, estimator='rotation'),
}
KINDS = [*('vq', 'residual', 'product', 'multiscale', 'gumbel', 'fsq', 'simvq')]
NO_SEARCH = ('gumbel', 'fsq')
SLOW = [f'{name} learned' for name in ('residual', 'product', 'multiscale')]
SLOW += ['vq learned', 'gumbel projected', 'simvq projected']
NAMES = [n for n in LAYERS if n not in SLOW]
NAMES += [pytest.param(n, marks=pytest.mark.slow) for n in SLOW]
EVERY = pytest.mark.parametrize('name', NAMES)
EACH = pytest.mark.parametrize('name', KINDS)


@functools.cache
def trained(name):
  layer = LAYERS[name]
  variables = jax.device_get(init(layer, Z))
  variables['params'] = moved(variables.get('params', {}))
  for seed in range(2):
    _, variables = train(layer, variables, random(7 + seed, *Z.shape))
  return jax.device_get(variables)


def assert_counts(ids, counts):
  """counts [L, K] are the numbers of ids [N, L]; L = 1 for one codebook."""
  counts = np.atleast_2d(counts)
  columns = np.reshape(ids, (-1, len(counts))).T
  expected = [np.bincount(x, minlength=K) for x in columns]
  np.testing.assert_array_equal(counts, expected)
  return counts


@pytest.mark.parametrize(
  'dtype',
  [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)],
)
@EVERY
def test_ids_decode_to_quantized_and_come_without_the_rest(name, dtype):
  layer, variables, z = LAYERS[name], trained(name), Z.astype(dtype)
  out, _ = evaluate(layer, variables, z)
  assert (out.quantized.dtype, out.quantized.shape) == (dtype, Z.shape)
  assert out.ids.dtype == jnp.int32 and len(np.unique(out.ids)) > 4
  vectors = decode(layer, variables, out.ids)
  assert vectors.dtype == jnp.float32
  assert_same_bits(vectors.astype(dtype), out.quantized)
  assert_same_bits(encode(layer, variables, z), out.ids)
  assert_same_bits(encode(layer, variables, z.astype(np.float32)), out.ids)
  for x in (out.loss, *out.metrics.values()):
    assert (x.dtype, x.shape) == (jnp.float32, ()) and np.isfinite(x)


@EVERY
def test_no_id_depends_on_a_product_in_tf32(name):
  lowered = encode.trace(LAYERS[name], trained(name), Z).lower(
    lowering_platforms=('cuda',)
  )
  lines = lowered.as_text().splitlines()
  products = [
    x for x in lines if re.search(r'stablehlo\.(dot_general|convolution)', x)
  ]
  assert products and all(len(re.findall('HIGHEST', x)) == 2 for x in products)


@EACH
def test_counts_usage_and_perplexity_follow_from_the_ids(name):
  layer = LAYERS[name]
  out, _ = evaluate(layer, trained(name), Z)
  counts = assert_counts(out.ids, out.counts)
  p = counts / counts.sum(1, keepdims=True)
  entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
  if name != 'multiscale':  # whose loop in float64 has its own test
    np.testing.assert_allclose(out.metrics['usage'], np.mean(counts > 0))
  got, want = out.metrics['perplexity'], np.exp(entropy).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('name', [n for n in KINDS if n not in NO_SEARCH])
def test_evaluation_counts_vectors_with_two_nearest_codes(name):
  layer, variables = LAYERS[name], trained(name)
  twice = jax.tree_util.tree_map_with_path(
    lambda path, x: np.repeat(x[::2], 2, 0) if 'embedding' in str(path) else x,
    variables,
  )
  few, all_ = (
    evaluate(layer, of, Z)[0].metrics['ambiguous_share']
    for of in (variables, twice)
  )
  assert few < 0.05 and all_ == 1
  assert 'ambiguous_share' not in train(layer, variables, Z)[0].metrics


@EVERY
def test_evaluation_and_init_write_nothing(name):
  layer = LAYERS[name]
  assert_same_bits(init(layer, Z, train=False), init(layer, Z))
  _, after = evaluate(layer, trained(name), Z)
  kept = {key: x for key, x in trained(name).items() if x}
  assert_same_bits({key: after[key] for key in kept}, kept)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in LAYERS
    if name.split()[0] in KINDS[:4]
  ],
)
def test_training_moves_every_codebook(name):
  before = trained(name)['codebook']
  _, after = train(LAYERS[name], trained(name), random(5, *Z.shape))
  differ = jax.tree.map(lambda x, y: np.any(x != y), before, after['codebook'])
  for path, changed in jax.tree.leaves_with_path(differ):
    assert changed or 'offset' in str(path), path


@EACH
def test_masked_positions_count_nowhere(name):
  layer, variables = LAYERS[name], trained(name)
  mask = np.random.default_rng(2).random(Z.shape[:-1]) < 0.7
  mask[0], mask[1] = False, True
  wild = np.where(mask[..., None], Z, 1e4).astype(np.float32)
  one, after_one = train(layer, variables, Z, mask)
  two, after_two = train(layer, variables, wild, mask)
  assert_same_bits(
    (one.counts, one.loss, one.metrics, after_one),
    (two.counts, two.loss, two.metrics, after_two),
  )
  if name == 'multiscale':  # a token on the finest grid, one or more per image
    assert mask.sum() + 7 < np.sum(one.counts) < 8 * one.ids.shape[1]
    whole, _ = train(layer, variables, Z)
    np.testing.assert_array_equal(one.ids[1], whole.ids[1])
    return
  assert_counts(np.asarray(one.ids)[mask], one.counts)


@EACH
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_only_itself(name, bad):
  layer, variables, spoilt = LAYERS[name], trained(name), Z.copy()
  spoilt[3, 1, 2, [1, 4]] = bad  # of both heads
  out, _ = evaluate(layer, variables, spoilt)
  whole, _ = evaluate(layer, variables, Z)
  others = np.ones(Z.shape[:-1], bool)
  others[3, 1, 2] = False
  if name == 'multiscale':
    others = others.all((1, 2))  # its whole image
  ids = np.asarray(out.ids)
  np.testing.assert_array_equal(ids[others], np.asarray(whole.ids)[others])
  assert 0 <= ids.min() <= ids.max() < K
  assert np.isfinite(out.quantized).all()
  if name != 'multiscale':
    assert_counts(ids[others], out.counts)
  for _ in range(2):
    _, variables = train(layer, variables, spoilt)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def share(layer, key, variables, z, mask):
  """A training step, maybe of one device's share."""
  out, variables = step(layer, variables, z, mask, key)
  loss = jax.lax.pmean(out.loss, 'data') if layer.axis_name else out.loss
  return variables, out.ids, loss, out.counts


ONCE = 'product', 'multiscale'  # by slow tests alone
ROUTES = [(name, 'shard_map') for name in KINDS if name not in ONCE]
SLOW_ROUTES = [
  ('product', 'shard_map'),
  ('vq', 'jit'),
  ('residual', 'jit'),
  ('multiscale', 'shard_map'),
]
SLOW_ROUTES += [('multiscale', 'jit')]
SLOW_ROUTES += [('vq learned', 'shard_map'), ('product learned', 'shard_map')]


@pytest.mark.parametrize(
  ('name', 'route'),
  ROUTES
  + [pytest.param(*route, marks=pytest.mark.slow) for route in SLOW_ROUTES],
)
def test_eight_devices_do_as_one(name, route):
  layer = LAYERS[name]
  if name == 'residual':  # else ties of all sizes, which rounding would break
    layer = layer.clone(dead_code_threshold=0.3)
  single = many = functools.partial(share, layer)
  mesh = sharding.data_mesh(jax.devices('cpu'))
  if route == 'shard_map':
    many = jax.shard_map(
      functools.partial(share, layer.clone(axis_name='data')),
      mesh=mesh,
      in_specs=(P(), P(), P('data'), P('data')),
      out_specs=(P(), P('data'), P(), P()),
    )
  rows, everywhere = sharding.by_rows(mesh), sharding.replicated(mesh)
  many = jax.jit(many, in_shardings=(everywhere, everywhere, rows, rows))
  single = jax.jit(single)
  scale = np.arange(1, 9, dtype=np.float32)[:, None, None, None]
  mask = np.arange(72).reshape(Z.shape[:-1]) ** 2 % 64 < 50
  mask[0] = False  # a device without a valid row
  start = init(layer, Z)
  got, one = [jax.device_put(start, everywhere)], [start]
  for seed, key in enumerate(jax.random.split(jax.random.key(0))):
    z = scale * random(seed, *Z.shape)
    got, one = many(key, got[0], z, mask), single(key, one[0], z, mask)
  np.testing.assert_array_equal(got[1], one[1])
  np.testing.assert_allclose(got[2], one[2], rtol=1e-5)
  np.testing.assert_array_equal(got[3], one[3])
  for x, y in zip(*map(jax.tree.leaves, (got[0], one[0])), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['vq', 'residual', 'multiscale'])
def test_the_gradient_is_one_rotation_onto_quantized(name):
  layer, variables, g = LAYERS[name], trained(name), random(1, *Z.shape)

  @jax.jit
  def gradients(z):
    quantized = lambda z: layer.apply(variables, z).quantized  # noqa: E731
    q = quantized(z)
    through = jax.grad(lambda z: jnp.sum(quantized(z) * g))(z)
    return through, jax.grad(lambda z: jnp.sum(rotate(z, q) * g))(z)

  got, expected = gradients(Z)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(np.asarray(got) - g).max() > 0.1  # not straight-through


WEIGHTS = {'commitment_weight': 0.0, 'codebook_weight': 0.0}
LEARNED = functools.partial(
  VectorQuantizer, K, ema=False, estimator='diveq', **WEIGHTS
)


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    (VectorQuantizer(-5), 'codebook_size: expected at least 1, got -5'),
    (VectorQuantizer(K, code_dim=0), 'code_dim: expected a value from 1 to'),
    (VectorQuantizer(K, estimator='gumbel'), 'rotation_unscaled, reflection'),
    (VectorQuantizer(K, decay=1.5), 'decay: expected a value from 0 to 1'),
    (VectorQuantizer(K, eps=0.0), 'eps: expected a value from 1e-30'),
    (VectorQuantizer(K, commitment_weight=-1), 'commitment_weight: expected'),
    (VectorQuantizer(K, codebook_weight=-1), 'codebook_weight: expected'),
    (VectorQuantizer(K, loss_form='eq5'), 'loss_form: .* paper_eq5'),
    (VectorQuantizer(K, max_scale=0), 'max_scale: expected at least 1e-30'),
    (VectorQuantizer(K, dead_code_threshold=float('nan')), 'threshold: expec'),
    (VectorQuantizer(K, split_by='size'), 'one of count, distortion'),
    (VectorQuantizer(K, split_fraction=2.0), 'split_fraction: expected'),
    (VectorQuantizer(K, init_from='kmeans'), 'one of data, normal'),
    *(
      (LEARNED(**change), 'trains learned codes by itself')
      for change in (
        {'ema': True},
        {'commitment_weight': 0.25},
        {'codebook_weight': 1.0},
        {'loss_form': 'paper_eq5'},
      )
    ),
    (SimVQ(K, estimator='diveq'), 'trains learned codes by itself'),
    (SimVQ(K, estimator='soft'), 'estimator: expected one of'),
    (VectorQuantizer(K, cosine=True, inner_product=True), 'inner_product: exp'),
    *(
      (kind(K, inner_product=True), f'{kind.__name__}: .*inner_product=False')
      for kind in (ResidualQuantizer, ProductQuantizer, MultiscaleQuantizer)
    ),
    (ResidualQuantizer(K, depth=0), 'depth: expected a value from 1 to 64'),
    (ResidualQuantizer(K, cosine=True), 'ResidualQuantizer: .*cosine=False'),
    (ResidualQuantizer(K, estimator='diveq'), 'for several codes, got .diveq'),
    (ResidualQuantizer(K, estimator='dynamic_ste'), 'for several codes'),
    (ProductQuantizer(K, heads=0), 'heads: expected a value from 1 to 64'),
    (ProductQuantizer(K, heads=4), '4 heads divide, got 6; or set code_dim'),
    (MultiscaleQuantizer(K, sides=(1, 3)), 'of the grid, 4, got .1, 3.; mul'),
    (MultiscaleQuantizer(K, sides=(2, 1, 4)), 'sides that grow'),
    (MultiscaleQuantizer(K, sides=(1, 4, 4)), 'sides that grow'),
    (MultiscaleQuantizer(K, sides=(0, 4)), 'sides: expected integers'),
    (MultiscaleQuantizer(K, cosine=True), 'Multiscale.*: .*cosine=False'),
    (MultiscaleQuantizer(K, estimator='dynamic_ste'), 'for several codes'),
    (GumbelQuantizer(K, temperature_start=0.0), 'temperature_start: expecte'),
    (GumbelQuantizer(K, temperature_end=0.0), 'temperature_end: expected at'),
    (GumbelQuantizer(K, temperature_steps=0), 'temperature_steps: expected'),
    (GumbelQuantizer(K, kl_weight=-1.0), 'kl_weight: expected at least 0'),
    (FSQ(1000), 'a power of two.*1000; use the nearest, 1024, or set `levels`'),
    (FSQ(K, levels=(8, 4)), 'multiply to codebook_size 16, got'),
    (FSQ(K, levels=(16, 1)), 'integers of at least 2'),
  ],
)
def test_impossible_arguments_are_refused_in_one_line(layer, message):
  z = jax.ShapeDtypeStruct((2, 4, 4, 6), jnp.float32)
  with one_line(message):
    jax.eval_shape(layer.init, jax.random.key(0), z)


@EACH
def test_inputs_of_another_kind_are_refused(name):
  layer, variables = LAYERS[name], trained(name)
  integers, short = np.zeros(Z.shape, np.int32), np.ones(8, bool)
  for method in (None, 'ids'):
    with one_line(r'expected float \[..., C\], got int'):
      layer.apply(variables, integers, method=method)
  for mask in (short, np.full(Z.shape[:-1], 255, np.uint8), Z[..., 0]):
    with one_line('expected a mask'):
      layer.apply(variables, Z, mask=mask)


@pytest.mark.parametrize('shape', [(2, 4, 8, 3), (4, 4, 3)])
def test_a_grid_that_is_not_square_has_no_scales(shape):
  with one_line('expected a square grid'):
    MultiscaleQuantizer(K).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('residual', (4, 4), r'\[..., d\] with d from 1 to 3 codes per position'),
    ('residual', (4, 0), r'\[..., d\] with d from 1 to 3 codes per position'),
    ('product', (4, 1), r'\[..., 2\], one code per head, got \(4, 1\)'),
    *(('multiscale', (2, t), r'T one of \[1, 5, 14\]') for t in (0, 2, 13, 15)),
    ('without sides', (2, 14), 'expected its argument sides'),
  ],
)
def test_ids_of_another_number_of_codes_are_refused(name, shape, message):
  layer = LAYERS.get(name, MultiscaleQuantizer(K))
  variables = trained(name if name in LAYERS else 'multiscale')
  with one_line(message):
    layer.apply(variables, np.zeros(shape, np.int32), method='codes_from_ids')
