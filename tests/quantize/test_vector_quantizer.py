"""The layer: what it writes, when, and what it returns."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax import ResidualQuantizer, VectorQuantizer, rotate
from rvq_jax.quantize.gumbel import GumbelQuantizer
from rvq_jax.quantize.simvq import SimVQ
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE

Z = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)


@functools.partial(
  jax.jit, static_argnames=('layer', 'train'), compiler_options=RUNS_ONCE
)
def init(layer, train=True):
  return layer.init(jax.random.key(0), Z, train=train)


@functools.partial(jax.jit, static_argnames='layer')
def _train(layer, variables, z, mask, rngs):
  out, updates = layer.apply(
    variables, z, train=True, mask=mask, mutable=['codebook'], rngs=rngs
  )
  return out, variables | updates


@functools.partial(jax.jit, static_argnames='layer')
def _evaluate(layer, variables, z):
  return layer.apply(variables, z, mutable=['codebook', 'params'])


# One signature each: a default argument left out would be another program.
def train(layer, variables, z=Z, mask=None, rngs=None):
  mask = np.ones(z.shape[:-1], bool) if mask is None else mask
  return _train(layer, variables, z, mask, rngs)


def evaluate(layer, variables, z=Z):
  return _evaluate(layer, variables, z)[0]


@functools.partial(jax.jit, static_argnames='layer')
def decode(layer, variables, ids):
  return layer.apply(variables, ids, method='codes_from_ids')


def make(**kwargs):
  kwargs = {'codebook_size': 8, 'code_dim': 6} | kwargs
  # What init gives does not depend on the other arguments.
  names = {'codebook_size', 'code_dim', 'ema', 'cosine', 'init_from'}
  start = VectorQuantizer(**{k: kwargs[k] for k in names & kwargs.keys()})
  return VectorQuantizer(**kwargs), init(start)


def assert_same_bits(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_collection_has_the_three_variables_in_float32():
  _, variables = make()
  shapes = {
    k: (v.shape, str(v.dtype)) for k, v in variables['codebook'].items()
  }
  assert shapes == {
    'embedding': ((8, 6), 'float32'),
    'cluster_size': ((8,), 'float32'),
    'embedding_sum': ((8, 6), 'float32'),
  }


def test_init_from_normal_expects_the_mean_count_and_sums_agree():
  _, variables = make(init_from='normal')
  book = variables['codebook']
  np.testing.assert_allclose(book['cluster_size'], 32 / 8)
  np.testing.assert_allclose(book['embedding_sum'], 4 * book['embedding'])


@pytest.mark.parametrize('init_from', ['data', 'normal'])
def test_init_is_not_a_training_step(init_from):
  layer, variables = make(init_from=init_from)
  quiet = init(layer, train=False)
  assert_same_bits(variables, quiet)


def test_evaluation_writes_nothing():
  layer, variables = make()
  _, variables = train(layer, variables)
  _, updates = _evaluate(layer, variables, Z)
  assert_same_bits(updates['codebook'], variables['codebook'])


def test_training_moves_every_variable():
  layer, variables = make()
  _, filled = train(layer, variables)
  _, after = train(layer, filled)
  for name, value in filled['codebook'].items():
    assert np.any(np.asarray(after['codebook'][name]) != value), name


def test_first_batch_fills_the_codebook_with_its_vectors():
  layer, variables = make(dead_code_threshold=0.0, decay=1.0)
  _, after = train(layer, variables)
  rows = {tuple(x) for x in Z.reshape(-1, 6).round(4)}
  codes = np.asarray(after['codebook']['embedding']).round(4)
  assert all(tuple(c) in rows for c in codes)
  _, later = train(layer, after, z=Z + 100)
  np.testing.assert_allclose(
    later['codebook']['embedding'], after['codebook']['embedding'], rtol=1e-4
  )


def test_a_first_batch_smaller_than_the_codebook_leaves_the_rest_to_later():
  layer, variables = make(codebook_size=50)
  sizes = []
  for step in range(3):
    z = np.random.default_rng(step).normal(size=Z.shape).astype(np.float32)
    _, variables = train(layer, variables, z=z)
    sizes.append(int((variables['codebook']['cluster_size'] > 0).sum()))
  assert sizes[-1] == 50


@pytest.mark.parametrize(
  'cosine', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_codes_beyond_the_first_batch_keep_their_place_until_used(cosine):
  layer, start = make(codebook_size=200, dead_code_threshold=0, cosine=cosine)
  variables, used = start, np.zeros(200)
  for step in range(20):
    z = np.random.default_rng(step).normal(size=Z.shape).astype(np.float32)
    out, variables = train(layer, variables, z=z)
    used += np.asarray(out.counts)
  unused = used == 0
  unused &= np.asarray(variables['codebook']['cluster_size']) == 0
  assert unused.sum() > 5
  before, after = (
    np.asarray(v['codebook']['embedding']) for v in (start, variables)
  )
  np.testing.assert_allclose(after[unused], before[unused], rtol=1e-6)


def test_ids_are_nearest_and_quantized_is_the_code_bit_exact():
  layer, variables = make()
  out = evaluate(layer, variables)
  codes = np.asarray(variables['codebook']['embedding'])
  distance = ((Z.reshape(-1, 1, 6) - codes[None].astype(float)) ** 2).sum(-1)
  np.testing.assert_array_equal(out.ids.reshape(-1), distance.argmin(1))
  assert_same_bits(out.quantized, codes[np.asarray(out.ids)])


@pytest.mark.parametrize(
  'estimator',
  [
    'rotation',
    pytest.param('reflection', marks=pytest.mark.slow),
    pytest.param('ste', marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_edge_inputs_give_codes_and_finite_gradients(estimator, dtype):
  layer = VectorQuantizer(8, estimator=estimator)
  _, variables = make()
  codes = np.array(variables['codebook']['embedding'])
  codes[0], codes[1], codes[3] = 0, 1e6, codes[2]
  variables['codebook']['embedding'] = codes
  rows = [
    codes[4],
    2 * codes[4],
    -codes[4],
    -codes[4] * (1 + 1e-6),
    0 * codes[4],
    codes[2],
    1e-12 * codes[5],
    1e6 * codes[5],
  ]
  z = np.stack(rows).astype(dtype)

  def loss(z):
    out = layer.apply(variables, z)
    return jnp.sum(jnp.sin(out.quantized.astype(jnp.float32))) + out.loss, out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(z)
  assert out.quantized.dtype == dtype
  assert_same_bits(out.quantized, codes[np.asarray(out.ids)].astype(dtype))
  assert np.isfinite(np.asarray(gradient, np.float32)).all()
  assert out.ids[5] == 2  # codes 2 and 3 are equal: the lower index


@pytest.mark.parametrize('size', [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize('dim', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_smallest_shapes_train(size, dim):
  layer = VectorQuantizer(codebook_size=size, code_dim=dim)
  z = np.ones((1, dim), np.float32)
  start = jax.jit(layer.init, compiler_options=RUNS_ONCE)
  variables = start(jax.random.key(0), z)
  out, after = train(layer, variables, z=z)
  assert out.ids.shape == (1,) and np.isfinite(float(out.loss))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_gradient_is_that_of_the_rotation():
  layer, variables = make()
  weights = np.random.default_rng(1).normal(size=Z.shape).astype(np.float32)

  @jax.jit
  def gradients(z):
    q = layer.apply(variables, z).quantized
    through = jax.grad(
      lambda z: jnp.sum(layer.apply(variables, z).quantized * weights)
    )
    return through(z), jax.grad(lambda z: jnp.sum(rotate(z, q) * weights))(z)

  np.testing.assert_allclose(*gradients(Z), rtol=1e-5, atol=1e-6)


@functools.cache
def output_and_gradients(form, ema):
  """The output, z - q, and the loss's gradients to variables and z."""
  layer, variables = make(
    loss_form=form, ema=ema, commitment_weight=0.3, codebook_weight=0.7
  )

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def gradients(variables, z):
    out = layer.apply(variables, z)
    return out.loss, out

  gradients, out = gradients(variables, Z)
  return out, Z - np.asarray(out.quantized), *map(jax.device_get, gradients)


@pytest.mark.parametrize('form', ['two_weights', 'paper_eq5', 'paper_eq8'])
def test_commitment_loss_is_what_trains_the_encoder(form):
  # A quadratic form: half of z - q times its gradient.
  out, d, _, to_z = output_and_gradients(form, False)
  want = 0.5 * np.sum(d * to_z)
  np.testing.assert_allclose(out.metrics['commitment_loss'], want, rtol=1e-4)


@pytest.mark.parametrize(
  'layer',
  [
    VectorQuantizer(8, init_from='normal'),
    pytest.param(
      ResidualQuantizer(8, init_from='normal', depth=2), marks=pytest.mark.slow
    ),
    SimVQ(8),
    pytest.param(GumbelQuantizer(8), marks=pytest.mark.slow),
  ],
  ids=lambda layer: type(layer).__name__,
)
def test_a_masked_loss_over_devices_is_that_of_the_global_batch(layer):
  z = np.random.default_rng(0).normal(size=(8, 8, 6)).astype(np.float32)
  z *= np.arange(8, dtype=np.float32)[:, None, None]
  mask = np.arange(64).reshape(8, 8) ** 2 % 64 < 20
  mask[0] = False  # a device without a valid row
  start = jax.jit(layer.init, compiler_options=RUNS_ONCE)
  variables = start(jax.random.key(0), z)
  mapped = layer.clone(axis_name='data')

  @jax.jit
  def losses(z, mask):
    shares = jax.vmap(
      lambda z, mask: mapped.apply(variables, z, mask=mask).loss,
      axis_name='data',
    )
    return shares(z, mask), layer.apply(variables, z, mask=mask).loss

  shares, one = losses(z, mask)
  np.testing.assert_allclose(shares.mean(), one, rtol=1e-5)


@pytest.mark.parametrize(
  ('form', 'ema', 'value', 'encoder'),
  [
    ('two_weights', True, 0.3, 0.3),
    ('two_weights', False, 0.3 + 0.7, 0.3),
    ('paper_eq5', False, 1 + 0.3, 1.0),
    ('paper_eq8', True, 0.5 * 0.3 * 6, 0.5 * 0.3 * 6),
  ],
)
def test_loss_form_has_the_weights_it_documents(form, ema, value, encoder):
  out, d, _, to_z = output_and_gradients(form, ema)
  np.testing.assert_allclose(out.loss, value * (d**2).mean(), rtol=1e-5)
  np.testing.assert_allclose(
    to_z, encoder * 2 * d / d.size, rtol=1e-4, atol=1e-7
  )


@pytest.mark.parametrize(
  ('form', 'weight'), [('two_weights', 0.7), ('paper_eq5', 1.3)]
)
def test_learned_codes_get_the_codebook_gradient(form, weight):
  out, d, to_variables, _ = output_and_gradients(form, False)
  want = np.zeros((8, 6))
  np.add.at(want, np.asarray(out.ids).reshape(-1), -d.reshape(-1, 6))
  np.testing.assert_allclose(
    to_variables['params']['embedding'],
    weight * 2 * want / d.size,
    rtol=1e-4,
    atol=1e-7,
  )


def test_projections_lead_to_code_dim_and_back():
  layer, variables = make(code_dim=2, init_from='normal')
  out = evaluate(layer, variables)
  assert out.quantized.shape == Z.shape
  assert variables['codebook']['embedding'].shape == (8, 2)
  codes = decode(layer, variables, out.ids)
  np.testing.assert_allclose(codes, out.quantized, rtol=1e-5, atol=1e-6)


def test_cosine_codes_have_unit_norm_and_win_by_angle():
  layer, variables = make(cosine=True, dead_code_threshold=1.2)
  for _ in range(3):
    out, variables = train(layer, variables)
  assert out.metrics['replaced_codes'] > 0  # they too
  codes = np.asarray(variables['codebook']['embedding'])
  np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
  out = evaluate(layer, variables)
  z = Z.reshape(-1, 6)
  cosine = (z @ codes.T) / np.linalg.norm(z, axis=1, keepdims=True)
  np.testing.assert_array_equal(out.ids.reshape(-1), cosine.argmax(1))


def test_masked_positions_stay_out_of_counts_losses_and_codebook():
  layer, variables = make()
  _, variables = train(layer, variables)
  mask = np.arange(32).reshape(2, 4, 4) % 8 < 5
  spoilt = np.where(mask[..., None], Z, 1e3).astype(np.float32)
  out, after = train(layer, variables, z=spoilt, mask=mask)
  want, want_after = train(layer, variables, z=Z[mask])
  np.testing.assert_allclose(out.loss, want.loss, rtol=1e-5)
  np.testing.assert_array_equal(out.counts, want.counts)
  for name in ('usage', 'perplexity', 'mean_angle', 'encoder_norm'):
    np.testing.assert_allclose(out.metrics[name], want.metrics[name], 1e-5)
  np.testing.assert_allclose(
    after['codebook']['cluster_size'],
    want_after['codebook']['cluster_size'],
    rtol=1e-5,
  )


def test_nan_in_a_row_never_reaches_the_codebook():
  layer, variables = make()
  spoilt = Z.copy()
  spoilt[0, 0, 0, 0] = np.nan
  for _ in range(2):
    out, variables = train(layer, variables, z=spoilt)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
  assert out.counts.sum() == 31


def test_dead_codes_come_back_to_the_data():
  layer, variables = make()
  first = np.arange(8) == 0
  far = np.where(first[:, None], 0, np.full((8, 6), 1e3, np.float32))
  size = np.where(first, np.float32(4), 0)
  variables['codebook'] = {
    'embedding': far,
    'cluster_size': size,
    'embedding_sum': size[:, None] * far,
  }
  out, after = train(layer, variables)
  assert out.metrics['replaced_codes'] == 7
  assert out.metrics['dead_codes'] == 7 / 8
  assert train(layer, after)[0].metrics['usage'] > 0.7


def test_the_draw_follows_the_rng_stream_and_needs_none():
  layer, variables = make(codebook_size=50)
  keys = [jax.random.key(i) for i in (1, 1, 2)]
  runs = [
    train(layer, variables, rngs={'codebook': key})[1]['codebook']
    for key in keys
  ]
  assert_same_bits(runs[0], runs[1])
  assert np.any(np.asarray(runs[0]['embedding']) != runs[2]['embedding'])
  train(layer, variables)


def test_counts_sum_to_the_number_of_vectors():
  layer, variables = make()
  out = evaluate(layer, variables)
  want = np.bincount(np.asarray(out.ids).reshape(-1), minlength=8)
  np.testing.assert_array_equal(out.counts, want)


def test_works_inside_another_module_under_scan():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Dense(6)(x)
      return VectorQuantizer(8, 6, name='vq')(x, train=train).quantized

  model = Model()
  start = functools.partial(model.init, x=Z, train=False)
  start = jax.jit(start, compiler_options=RUNS_ONCE)
  variables = start(jax.random.key(0))

  @jax.jit
  def run(book, batches):
    def step(book, z):
      out, updates = model.apply(
        {'params': variables['params'], 'codebook': book},
        z,
        True,
        mutable=['codebook'],
      )
      return updates['codebook'], out

    return jax.lax.scan(step, book, batches)

  book, out = run(variables['codebook'], np.stack([Z, Z, Z]))
  assert out.shape == (3, *Z.shape)
  assert (np.asarray(book['vq']['cluster_size']) > 0).all()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'codebook_size': -5}, 'codebook_size: expected at least 1, got -5'),
    ({'codebook_size': 8.0}, 'codebook_size: expected an integer'),
    ({'estimator': 'gumbel'}, 'rotation, rotation_unscaled, reflection, ste'),
    ({'decay': 1.5}, 'decay'),
    ({'eps': 0.0}, 'eps'),
    ({'commitment_weight': -1}, 'commitment_weight'),
    ({'loss_form': 'eq5'}, 'paper_eq5'),
    ({'max_scale': 0}, 'max_scale'),
    ({'dead_code_threshold': float('nan')}, 'dead_code_threshold'),
    ({'init_from': 'kmeans'}, 'data, normal'),
  ],
)
def test_impossible_arguments_are_refused(arguments, message):
  layer = VectorQuantizer(**({'codebook_size': 8, 'code_dim': 6} | arguments))
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), Z)


def test_wrong_inputs_are_refused():
  layer, variables = make()
  with pytest.raises(ValueError, match='expected float'):
    layer.apply(variables, np.zeros((2, 6), np.int32))
  with pytest.raises(ValueError, match='mask'):
    layer.apply(variables, Z, mask=np.ones((2, 4), bool))


def test_frozen_codes_stay_and_the_encoder_still_learns():
  layer, variables = make(init_from='normal', freeze=True)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(z):
    out, after = layer.apply(variables, z, train=True, mutable=['codebook'])
    return out.loss, (out, after)

  to_z, (out, after) = gradient(Z)
  assert_same_bits(after, variables)
  assert 'replaced_codes' not in out.metrics
  assert np.any(np.asarray(to_z))


def test_frozen_codes_are_filled_from_the_first_batch_and_then_stay():
  layer, variables = make(freeze=True)
  _, filled = train(layer, variables)
  rows = {tuple(x) for x in Z.reshape(-1, 6).round(4)}
  codes = np.asarray(filled['codebook']['embedding']).round(4)
  assert all(tuple(c) in rows for c in codes)
  _, later = train(layer, filled, z=Z + 100)
  assert_same_bits(later, filled)
  run = jax.jit(lambda: layer.apply(filled, Z, train=True))  # not mutable
  assert_same_bits(run().quantized, train(layer, filled)[0].quantized)


@pytest.mark.parametrize('form', ['two_weights', 'paper_eq5'])
def test_frozen_learned_codes_get_no_gradient(form):
  layer, variables = make(ema=False, freeze=True, loss_form=form)

  @jax.jit
  @jax.grad
  def gradient(params):
    out = layer.apply(variables | {'params': params}, Z, train=True)
    return out.loss + jnp.sum(out.quantized)

  got = gradient(variables['params'])['embedding']
  np.testing.assert_array_equal(got, np.zeros((8, 6)))


def test_vmap_over_layers_is_each_layer_in_turn():
  layer, variables = make()
  inputs = np.random.default_rng(1).normal(size=(3, 20, 6)).astype(np.float32)
  books = jax.tree.map(lambda x: np.stack([x, x, x]), variables)
  step = jax.jit(jax.vmap(functools.partial(train, layer)))
  outputs, books = step(books, inputs)
  outputs, books = step(books, inputs[::-1])
  for i in range(3):
    _, one = train(layer, variables, z=inputs[i])
    out, one = train(layer, one, z=inputs[2 - i])
    np.testing.assert_array_equal(outputs.ids[i], out.ids)
    for got, want in zip(
      jax.tree.leaves(books), jax.tree.leaves(one), strict=True
    ):
      np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
