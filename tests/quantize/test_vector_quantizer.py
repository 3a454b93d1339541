"""The layer: what it writes, when, and what it returns."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from errors import one_line
from layer_programs import (
  assert_same_bits,
  encode,
  evaluate,
  init,
  nearest,
  random,
  train,
)

from rvq_jax import VectorQuantizer

Z = random(0, 2, 4, 4, 6)


# One signature each: a default argument left out would be another program.
def make(**kwargs):
  kwargs = {'codebook_size': 8, 'code_dim': 6} | kwargs
  # What init gives does not depend on the other arguments.
  names = {'codebook_size', 'code_dim', 'ema', 'cosine', 'init_from'}
  start = VectorQuantizer(**{k: kwargs[k] for k in names & kwargs.keys()})
  return VectorQuantizer(**kwargs), init(start, Z)


def test_collection_has_the_three_variables_in_float32():
  _, variables = make()
  book = variables['codebook']
  assert all(x.dtype == np.float32 for x in book.values())
  shapes = {'embedding': (8, 6), 'cluster_size': (8,), 'embedding_sum': (8, 6)}
  assert {name: x.shape for name, x in book.items()} == shapes


@pytest.mark.parametrize(
  'cosine', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_codes_beyond_the_first_batch_keep_their_place_until_used(cosine):
  layer, start = make(codebook_size=200, dead_code_threshold=0, cosine=cosine)
  variables, used = start, np.zeros(200)
  for step in range(20):
    z = random(step, *Z.shape)
    out, variables = train(layer, variables, z)
    used += np.asarray(out.counts)
  before, after = jax.device_get((start['codebook'], variables['codebook']))
  unused = (used == 0) & (after['cluster_size'] == 0)
  assert unused.sum() > 5
  np.testing.assert_allclose(
    after['embedding'][unused], before['embedding'][unused], rtol=1e-6
  )


def test_ids_are_nearest_and_quantized_is_the_code_bit_exact():
  layer, variables = make()
  out, _ = evaluate(layer, variables, Z)
  codes = np.asarray(variables['codebook']['embedding'])
  ids = nearest(Z.reshape(-1, 6), codes)
  np.testing.assert_array_equal(np.ravel(out.ids), ids)
  assert_same_bits(out.quantized, codes[np.asarray(out.ids)])


@pytest.mark.parametrize('size', [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize('dim', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_smallest_shapes_train(size, dim):
  layer, z = VectorQuantizer(size, dim), np.ones((1, dim), np.float32)
  out, after = train(layer, init(layer, z), z)
  assert out.ids.shape == (1,) and np.isfinite(float(out.loss))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def codes_of(variables):
  book = variables['codebook']
  if 'offset' in book:
    return np.asarray(variables['params']['embedding'] + book['offset'])
  return np.asarray(book['embedding'])


@pytest.mark.parametrize(
  'arguments', [{'decay': 1.0}, {'ema': False}, {'freeze': True}]
)
def test_only_the_first_batch_fills_the_codebook(arguments):
  layer, variables = make(dead_code_threshold=0.0, **arguments)
  _, filled = train(layer, variables, Z)
  rows = {tuple(x) for x in Z.reshape(-1, 6).round(4)}
  assert all(tuple(code) in rows for code in codes_of(filled).round(4))
  _, later = train(layer, filled, Z + 100)
  np.testing.assert_allclose(codes_of(later), codes_of(filled), rtol=1e-4)
  if layer.freeze:
    assert_same_bits(later, filled)
    run = jax.jit(lambda: layer.apply(filled, Z, train=True))  # not mutable
    assert_same_bits(run().quantized, train(layer, filled, Z)[0].quantized)
  if not layer.ema:  # the parameter is left to the optimizer
    assert_same_bits(filled['params'], variables['params'])


@pytest.mark.parametrize(
  'arguments', [{}, {'ema': False}, {'ema': False, 'cosine': True}]
)
def test_dead_codes_come_back_to_the_data(arguments):
  layer, variables = make(init_from='normal', **arguments)
  first = np.arange(8) == 0
  far = np.where(first[:, None], Z[0, 0, 0], np.full((8, 6), 1e3, np.float32))
  book = {'cluster_size': np.where(first, np.float32(4), 0)}
  if layer.ema:
    sums = book['cluster_size'][:, None] * far
    variables['codebook'] = book | {'embedding': far, 'embedding_sum': sums}
  else:
    variables['params'] = {'embedding': far}
    variables['codebook'] = variables['codebook'] | book
  out, after = train(layer, variables, Z)
  assert out.metrics['replaced_codes'] == 7
  assert out.metrics['dead_codes'] == 7 / 8
  assert train(layer, after, Z)[0].metrics['usage'] > 0.7


def test_the_draw_follows_the_rng_stream_and_needs_none():
  layer, variables = make(codebook_size=50)
  one, same, other = (
    train(layer, variables, Z, seed=seed)[1]['codebook'] for seed in (1, 1, 2)
  )
  assert_same_bits(one, same)
  assert np.any(one['embedding'] != other['embedding'])
  apply = functools.partial(layer.apply, train=True, mutable=['codebook'])
  _, after = jax.jit(apply)(variables, Z)
  assert np.all(np.isfinite(after['codebook']['embedding']))


def test_the_second_step_of_learned_codes_is_no_other_program():
  layer, variables = make(ema=False)
  _, after = jax.eval_shape(functools.partial(train, layer), variables, Z)
  for x, y in zip(*map(jax.tree.leaves, (after, variables)), strict=True):
    assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


def test_sizes_of_learned_codes_are_a_moving_average_of_the_counts():
  options = {'init_from': 'normal', 'decay': 0.75, 'dead_code_threshold': 0.0}
  layer, variables = make(ema=False, **options)
  out, after = train(layer, variables, Z)
  before = variables['codebook']['cluster_size']
  np.testing.assert_allclose(before, 32 / 8)
  want = 0.75 * before + 0.25 * np.asarray(out.counts)
  np.testing.assert_allclose(after['codebook']['cluster_size'], want, rtol=1e-6)


@functools.cache
def output_and_gradients(form, ema):
  """The output, z - q, and the loss's gradients to variables and z."""
  weights = {'commitment_weight': 0.3, 'codebook_weight': 0.7}
  layer, variables = make(loss_form=form, ema=ema, **weights)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def gradients(variables, z):
    out = layer.apply(variables, z)
    return out.loss, out

  gradients, out = gradients(variables, Z)
  return out, Z - np.asarray(out.quantized), *map(jax.device_get, gradients)


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
  error = (d**2).mean()
  np.testing.assert_allclose(out.loss, value * error, rtol=1e-5)
  want = encoder * 2 * d / d.size
  np.testing.assert_allclose(to_z, want, rtol=1e-4, atol=1e-7)
  got = out.metrics['commitment_loss']  # what trains the encoder
  np.testing.assert_allclose(got, encoder * error, rtol=1e-4)


@pytest.mark.parametrize(
  ('form', 'weight'), [('two_weights', 0.7), ('paper_eq5', 1.3)]
)
def test_learned_codes_get_the_codebook_gradient(form, weight):
  out, d, to_variables, _ = output_and_gradients(form, False)
  want = np.zeros((8, 6))
  np.add.at(want, np.ravel(out.ids), -weight * 2 / d.size * d.reshape(-1, 6))
  got = to_variables['params']['embedding']
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_cosine_codes_have_unit_norm_and_win_by_angle():
  layer, variables = make(cosine=True, dead_code_threshold=1.2)
  for _ in range(3):
    out, variables = train(layer, variables, Z)
  assert out.metrics['replaced_codes'] > 0  # they too
  codes = np.asarray(variables['codebook']['embedding'])
  np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
  out, _ = evaluate(layer, variables, Z)
  z = Z.reshape(-1, 6)
  cosine = (z @ codes.T) / np.linalg.norm(z, axis=1, keepdims=True)
  np.testing.assert_array_equal(out.ids.reshape(-1), cosine.argmax(1))


def test_the_largest_inner_product_wins_and_codes_need_to_be_frozen():
  layer, variables = make(inner_product=True, freeze=True, init_from='normal')
  book = variables['codebook']
  book['embedding'] *= np.float32(2.0) ** (np.arange(8) % 3)[:, None]
  scores = Z.reshape(-1, 6) @ np.asarray(book['embedding']).T
  want = scores.argmax(1).reshape(Z.shape[:-1])
  assert np.any(want.ravel() != nearest(Z.reshape(-1, 6), book['embedding']))
  out, _ = evaluate(layer, variables, Z)
  np.testing.assert_array_equal(out.ids, want)
  np.testing.assert_array_equal(encode(layer, variables, Z), want)
  trained, after = train(layer, variables, Z)
  np.testing.assert_array_equal(trained.ids, want)
  assert_same_bits(after['codebook'], book)
  with one_line("^inner_product: expected freeze='codes' .* softmax over all"):
    train(layer.clone(freeze=False), variables, Z)


def test_masked_positions_stay_out_of_counts_losses_and_codebook():
  layer, variables = make()
  _, variables = train(layer, variables, Z)
  mask = np.arange(32).reshape(2, 4, 4) % 8 < 5
  spoilt = np.where(mask[..., None], Z, 1e3).astype(np.float32)
  out, after = train(layer, variables, spoilt, mask)
  want, want_after = train(layer, variables, Z[mask])
  np.testing.assert_allclose(out.loss, want.loss, rtol=1e-5)
  np.testing.assert_array_equal(out.counts, want.counts)
  for name in ('usage', 'perplexity', 'mean_angle', 'encoder_norm'):
    np.testing.assert_allclose(out.metrics[name], want.metrics[name], 1e-5)
  got, want = (x['codebook']['cluster_size'] for x in (after, want_after))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_works_inside_another_module_under_scan():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Dense(6)(x)
      return VectorQuantizer(8, 6, name='vq')(x, train=train).quantized

  model = Model()
  variables = init(model, Z, train=False)

  def step(book, z):
    variables['codebook'] = book
    out, updates = model.apply(variables, z, True, mutable=['codebook'])
    return updates['codebook'], out

  run = jax.jit(functools.partial(jax.lax.scan, step))
  book, out = run(variables['codebook'], np.stack([Z, Z, Z]))
  assert out.shape == (3, *Z.shape)
  assert (np.asarray(book['vq']['cluster_size']) > 0).all()


@pytest.mark.parametrize(
  ('ema', 'form'),
  [(True, 'two_weights'), (False, 'two_weights'), (False, 'paper_eq5')],
)
def test_freeze_stops_the_codes_and_not_the_encoder(ema, form):
  options = {'freeze': True, 'init_from': 'normal', 'loss_form': form}
  layer, variables = make(ema=ema, **options)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def gradients(variables, z):
    out, after = layer.apply(variables, z, train=True, mutable=['codebook'])
    return out.loss, (out.metrics, after)

  (to_variables, to_z), (metrics, after) = gradients(variables, Z)
  assert_same_bits(after['codebook'], variables['codebook'])
  assert 'replaced_codes' not in metrics and np.any(to_z)
  assert not any(np.any(x) for x in jax.tree.leaves(to_variables))


def test_vmap_over_layers_is_each_layer_in_turn():
  layer, variables = make()
  inputs = random(1, 3, 20, 6)
  books = jax.tree.map(lambda x: np.stack([x, x, x]), variables)
  step = jax.jit(jax.vmap(functools.partial(train, layer)))
  outputs, books = step(books, inputs)
  outputs, books = step(books, inputs[::-1])
  for i in range(3):
    _, one = train(layer, variables, inputs[i])
    out, one = train(layer, one, inputs[2 - i])
    np.testing.assert_array_equal(outputs.ids[i], out.ids)
    for got, want in zip(*map(jax.tree.leaves, (books, one)), strict=True):
      np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
