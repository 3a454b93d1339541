"""What one train step of a model and an optimizer from a config computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_step import IMAGES as ALL_IMAGES
from tiny_step import first_moment, step_of

from rvq_jax import VectorQuantizer
from rvq_jax.training.build import build_model
from rvq_jax.training.config import check_config
from rvq_jax.training.state import FAST_COMPILE

IMAGES = ALL_IMAGES[:8]
# Each is one program; what several tests ask is in one of them.
STEPS = {
  'rotation': {},
  'reflection': {'model.estimator': 'reflection'},
  'ste': {'model.estimator': 'ste', 'model.dead_code_threshold': 100.0},
  'learned': {
    'model.ema': False,
    'model.commitment_weight': 0.75,
    'model.codebook_weight': 3.0,
    'optimizer.weight_decay': 0.5,
  },
  'averaged': {
    'model.decay': 0.75,
    'model.dead_code_threshold': 0.0,
    'model.loss_form': 'paper_eq8',
    'model.commitment_weight': 0.5,
  },
}


@pytest.fixture(scope='module')
def first_step(make_step_config):
  """Returns a function of a name in STEPS: model, two states, metrics."""

  @functools.cache
  def take(name):
    fields = {'model.init_from': 'normal'} | STEPS[name]
    flat = check_config(make_step_config(fields))
    model = build_model(flat)
    state, step = step_of(flat, model)
    return model, state, *step(state, {'image': IMAGES})

  return take


def dense_maps(estimator, e, q):
  """dq/de of each row as the paper writes it, [N, D, D], in float64."""
  e, q = np.float64(e), np.float64(q)
  lengths = [np.linalg.norm(x, axis=1)[:, None] for x in (e, q)]
  scale = np.minimum(lengths[1] / lengths[0], 10.0)[:, :, None]
  u, v = e / lengths[0], q / lengths[1]
  eye = np.eye(e.shape[1])[None]

  def outer(a, b):
    return a[:, :, None] * b[:, None, :]

  if estimator == 'ste':
    return np.broadcast_to(eye, scale.shape[:1] + eye.shape[1:])
  if estimator == 'reflection':
    r = (u - v) / np.linalg.norm(u - v, axis=1)[:, None]
    return scale * (eye - 2 * outer(r, r))
  w = (u + v) / np.linalg.norm(u + v, axis=1)[:, None]
  return scale * (eye - 2 * outer(w, w) + 2 * outer(v, u))


def variables_of(state, part):
  """Those of the encoder or the decoder."""
  parts = {'params': state.params, 'batch_stats': state.batch_stats}
  return {n: {part: v[part]} for n, v in parts.items() if part in v}


# A static argument, the same for all names, so that they share a program.
def plain(model):
  return model.clone(vq=VectorQuantizer(codebook_size=8))


def _latents(model, variables):
  """z [N, D] of a training batch."""
  z, _ = model.apply(
    variables, IMAGES, train=True, method='latents', mutable=['batch_stats']
  )
  return z.reshape(-1, z.shape[-1])


latents = jax.jit(_latents, static_argnums=0, compiler_options=FAST_COMPILE)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def encoders_gradient(model, variables, arrives):
  """The gradient of the encoder's parameters; `arrives` is the one of z."""
  return jax.grad(lambda v: jnp.sum(_latents(model, v) * arrives))(variables)


def encode(model, state):
  """z [N, D], the codes [K, D] and the nearest of them [N]."""
  z = np.asarray(latents(plain(model), variables_of(state, 'encoder')))
  book = {**state.params.get('vq', {}), **state.codebook['vq']}
  codes = np.asarray(book['embedding'])
  return z, codes, ((z[:, None] - codes[None]) ** 2).sum(-1).argmin(1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def decoders_gradient(model, variables, q):
  """Of the mean squared error by the codes q [N, D]."""

  def error(q):
    x, _ = model.apply(
      variables,
      q.reshape(8, 4, 4, 8),
      method=lambda model, q: model.decoder(q, train=True),
      mutable=['batch_stats'],
    )
    return jnp.mean((x - IMAGES) ** 2)

  return jax.grad(error)(q)


@pytest.mark.parametrize(
  'estimator',
  ['rotation', 'ste', pytest.param('reflection', marks=pytest.mark.slow)],
)
def test_the_encoders_gradient_is_that_of_the_estimators_matrix(
  estimator, first_step
):
  model, state, after, _ = first_step(estimator)
  z, codes, ids = encode(model, state)
  q, model = codes[ids], plain(model)
  g = np.asarray(decoders_gradient(model, variables_of(state, 'decoder'), q))
  arrives = np.einsum('nij,ni->nj', dense_maps(estimator, z, q), g)
  arrives += 0.25 * 2 * (z - q) / z.size
  want = encoders_gradient(
    model, variables_of(state, 'encoder'), np.float32(arrives)
  )['params']['encoder']
  got = jax.device_get(first_moment(after)['encoder'])
  got = jax.tree.map(lambda m: 10 * m, got)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max()) + 1e-7)


def test_estimators_differ_in_the_encoders_gradient_alone(first_step):
  a, b = (
    jax.device_get(first_moment(first_step(name)[2]))
    for name in ('rotation', 'ste')
  )
  apart = optax.tree.norm(optax.tree.sub(a['encoder'], b['encoder']))
  assert apart > 0.05 * optax.tree.norm(a['encoder'])
  decoders = map(jax.tree.leaves, (a['decoder'], b['decoder']))
  for x, y in zip(*decoders, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
  ('name', 'weight'),
  [('rotation', 0.25), ('learned', 3.75), ('averaged', 0.5 * 0.5 * 8)],
)
def test_the_steps_loss_has_the_configs_weights(name, weight, first_step):
  model, state, _, metrics = first_step(name)
  z, codes, ids = encode(model, state)
  want = weight * np.mean((z - codes[ids]) ** 2)
  got = metrics['loss'] - metrics['mse']
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_steps_codebook_moves_at_the_configs_decay(first_step):
  model, state, after, _ = first_step('averaged')
  z, _, ids = encode(model, state)
  before = state.codebook['vq']
  size = 0.75 * np.asarray(before['cluster_size'])
  total = 0.75 * np.asarray(before['embedding_sum'])
  for e, code in zip(z, ids, strict=True):
    size[code] += 0.25
    total[code] += 0.25 * e
  smooth = (size + 1e-5) / (size.sum() + 8e-5) * size.sum()
  got = after.codebook['vq']
  np.testing.assert_allclose(got['cluster_size'], size, rtol=1e-5)
  want = total / smooth[:, None]
  np.testing.assert_allclose(got['embedding'], want, rtol=1e-4, atol=1e-5)


def test_codes_under_the_configs_threshold_are_replaced(first_step):
  # The threshold of 'ste' is above every count, of 'averaged' it is zero.
  assert first_step('ste')[3]['replaced_codes'] == 8
  assert first_step('averaged')[3].get('replaced_codes', 0) == 0


def test_weight_decay_reaches_the_kernels_alone(first_step):
  _, state, after, _ = jax.device_get(first_step('learned'))
  moments = (optax.tree.get(after.opt_state, name) for name in ('mu', 'nu'))
  kernels, before = 0, jax.tree_util.tree_leaves_with_path(state.params)
  trees = map(jax.tree.leaves, (after.params, *moments))
  for (path, p), new, mu, nu in zip(before, *trees, strict=True):
    is_kernel = path[-1].key == 'kernel'
    kernels += is_kernel
    # After one step, Adam's averages are a share of the gradient, its square.
    adam = 2e-4 * (mu / 0.1) / (np.sqrt(nu / 0.001) + 1e-8)
    want = -2e-4 * 0.5 * p if is_kernel else np.zeros(p.shape)
    np.testing.assert_allclose(new - p + adam, want, rtol=2e-2, atol=1e-7)
  assert 0 < kernels < len(before)
