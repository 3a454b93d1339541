"""Shapes, dtypes, bits and errors of the whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from tiny_model import init, tiny_vqvae

from rvq_jax import VQVAE

SLOW = pytest.mark.slow
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype('f')


def build(factor=4, dtype=jnp.float32, **quantizer):
  sizes = {'widths': (4, 8), 'num_res_blocks': 1, 'code_dim': 6}
  return tiny_vqvae(quantizer, factor=factor, dtype=dtype, **sizes)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def apply(model, variables, x, method=None):
  return model.apply(variables, x, method=method)


@pytest.mark.parametrize('factor', [4, 8, 16])
def test_shapes_follow_the_factor_and_results_are_float32(factor):
  model, x = build(factor, dtype=jnp.bfloat16), jnp.zeros((2, 48, 32, 3))
  variables = init.eval_shape(model, IMAGES)
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  out = jax.eval_shape(model.apply, variables, x)
  assert out.reconstruction.shape == x.shape
  assert out.reconstruction.dtype == jnp.float32
  assert out.quantizer.ids.shape == (2, 48 // factor, 32 // factor)


@pytest.mark.parametrize(
  'dtype', [jnp.float32, pytest.param(jnp.bfloat16, marks=SLOW)]
)
@pytest.mark.parametrize('ema', [True, pytest.param(False, marks=SLOW)])
def test_decode_of_encode_is_the_reconstruction_bit_exact(dtype, ema):
  model, x = build(dtype=dtype, ema=ema), IMAGES
  variables = init(model, x, train=True)
  ids = apply(model, variables, x, method='encode')
  assert ids.dtype == jnp.int32
  got = apply(model, variables, ids, method='decode')
  want = apply(model, variables, x).reconstruction
  assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
  assert np.abs(got).max() <= 1


@pytest.mark.parametrize('name', ['vq', 'product'])
def test_without_codes_the_decoder_gets_latents_in_the_form_of_codes(name):
  model = tiny_vqvae({'name': name, 'cosine': True})
  variables = init(model, IMAGES)
  out = jax.jit(functools.partial(model.apply, quantize=False))(
    variables, IMAGES
  )
  z = np.asarray(out.latents)
  pieces = z.reshape(*z.shape[:-1], 2 if name == 'product' else 1, -1)
  unit = pieces / np.linalg.norm(pieces, axis=-1, keepdims=True)
  want = model.decoder.apply(
    {key: x['decoder'] for key, x in variables.items() if 'decoder' in x},
    unit.reshape(z.shape),
  )
  np.testing.assert_allclose(out.reconstruction, want, atol=1e-5)


def test_evaluation_leaves_every_collection_as_it_was():
  model, x = build(), IMAGES
  variables = init(model, x, train=True)
  _, updates = jax.jit(
    lambda v: model.apply(v, x, mutable=['params', 'batch_stats', 'codebook'])
  )(variables)
  for a, b in zip(*map(jax.tree.leaves, (updates, variables)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@SLOW
def test_every_parameter_gets_a_gradient():
  model, x = build(init_from='normal'), IMAGES
  variables = init(model, x, train=True)

  @jax.jit
  @jax.grad
  def gradient(params):
    given = variables | {'params': params}
    mutable = ['batch_stats', 'codebook']
    out, _ = model.apply(given, x, train=True, mutable=mutable)
    return jnp.mean((out.reconstruction - x) ** 2) + out.quantizer.loss

  # Away from the start, where the residual branches are multiplied by zero.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32),
    variables['params'],
  )
  grads = tree_leaves_with_path(gradient(params))
  still = [keystr(path) for path, g in grads if not np.any(g)]
  # A bias in front of the softmax over keys moves every score alike.
  assert all("'key']['bias'" in name for name in still), still


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 15, 16, 3), '.* multiples of 4, got 15x16; crop or pad'),
    ((1, 16, 16, 1), r'expected float \[B, h, w, 3\]'),
    ((16, 16, 3), r'expected float \[B, h, w, 3\]'),
    ((1, 0, 16, 3), '.* multiples of 4, got 0x16'),
  ],
)
def test_other_images_are_refused(shape, message):
  with pytest.raises(ValueError, match=f'^images: {message}'):
    init.eval_shape(build(), jnp.zeros(shape))


def test_the_papers_model_has_the_parameters_of_its_description():
  strided = sum(9 * a * b + 2 * b for a, b in ((3, 64), (64, 128), (128, 256)))
  blocks = 6 * 2 * (9 * 256**2 + 2 * 256)
  one_by_one = 256**2 + 256
  attention = 4 * one_by_one + 2 * 256
  transposed = sum(16 * a * b + b for a, b in ((256, 128), (128, 64), (64, 3)))
  norms = 2 * (128 + 64)
  want = strided + 2 * (blocks + one_by_one) + attention + transposed + norms
  shapes = init.eval_shape(VQVAE(), jnp.zeros((1, 32, 32, 3)))
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == want
  assert shapes['codebook']['vq']['embedding'].shape == (16384, 256)


def test_the_variables_have_the_names_that_checkpoints_hold():
  blocks = [f'{part}/block0' for part in ('encoder', 'decoder')]
  norms = ['encoder/norm0', 'encoder/norm1', 'decoder/norm1']
  norms += [f'{block}/norm{i}' for block in blocks for i in (0, 1)]
  plain = ['encoder/conv0', 'encoder/conv1']
  plain += [f'{block}/conv{i}' for block in blocks for i in (0, 1)]
  biased = ['encoder/out', 'decoder/in', 'decoder/up0', 'decoder/up1']
  biased += [f'decoder/attention/{n}' for n in ('query', 'key', 'value', 'out')]
  scaled = [*(f'{norm}/bn' for norm in norms), 'decoder/attention/norm']
  codes = 'embedding', 'cluster_size', 'embedding_sum'
  variables = init.eval_shape(build(), IMAGES)
  assert {
    keystr(path, simple=True, separator='/')
    for path, _ in tree_leaves_with_path(variables)
  } == {
    *(f'params/{name}/kernel' for name in plain + biased),
    *(f'params/{name}/bias' for name in biased + scaled),
    *(f'params/{name}/scale' for name in scaled),
    *(f'batch_stats/{norm}/bn/{x}' for norm in norms for x in ('mean', 'var')),
    *(f'codebook/vq/{name}' for name in codes),
  }
