"""The encoder's gradient in a train step is the one of the estimator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import IMAGES, RATE, first_state, take, tiny_step

from rvq_jax.training.state import FAST_COMPILE

grad = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  'estimator',
  ['rotation', *(pytest.param(x, marks=SLOW) for x in ('ste', 'reflection'))],
)
def test_the_encoders_gradient_is_that_of_the_estimators_matrix(estimator):
  step = tiny_step({'estimator': estimator, 'init_from': 'normal'}, flip=False)
  state = first_state(step)
  after, metrics = take(step, state)

  def apply(params, x, method):
    variables = state.variables | {'params': params}
    mutable = ['batch_stats']
    return step.model.apply(variables, x, method=method, mutable=mutable)[0]

  def latents(params):
    encode = lambda model, x: model.latents(x, train=True)  # noqa: E731
    return apply(params, IMAGES, encode).reshape(-1, 4)

  def error(q):
    decode = lambda model, q: model.decoder(q, train=True)  # noqa: E731
    images = apply(state.params, q.reshape(-1, 2, 2, 4), decode)
    return jnp.mean((images - IMAGES) ** 2)

  def arriving(params, gradient):
    return jnp.sum(latents(params) * gradient)

  z = np.asarray(jax.jit(latents)(state.params))
  codes = state.codebook['vq']['embedding']
  q = codes[((z[:, None] - codes[None]) ** 2).sum(-1).argmin(1)]
  loss = metrics['mse'] + 0.25 * np.mean((z - q) ** 2)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  gradient = np.asarray(grad(jax.grad(error))(q))
  maps = dense_maps(estimator, z, q)
  gradient = np.einsum('nij,ni->nj', maps, gradient) + 0.5 * (z - q) / z.size
  want = grad(jax.grad(arriving))(state.params, np.float32(gradient))
  for old, new, b in zip(
    *(jax.tree.leaves(s.params['encoder']) for s in (state, after)),
    jax.tree.leaves(want['encoder']),
    strict=True,
  ):
    atol = 1e-3 * float(np.abs(b).max()) + 1e-6
    np.testing.assert_allclose((old - new) / RATE, b, rtol=1e-3, atol=atol)
