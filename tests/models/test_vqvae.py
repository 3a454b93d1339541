"""Shapes, dtypes, bits and errors of the whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny_vqvae

from rvq_jax import VQVAE
from rvq_jax.training.state import FAST_COMPILE as RUNS_ONCE


def build(factor=4, dtype=jnp.float32, **quantizer):
  sizes = {'widths': (4, 8), 'num_res_blocks': 1, 'code_dim': 6}
  return tiny_vqvae(quantizer, factor=factor, dtype=dtype, **sizes)


def start(model, x):
  return model.init(jax.random.key(0), x, train=True)


init = jax.jit(start, static_argnums=0, compiler_options=RUNS_ONCE)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def apply(model, variables, x, method=None):
  return model.apply(variables, x, method=method)


def images(height=16, width=16, seed=0):
  x = np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3))
  return x.astype(np.float32)


@pytest.mark.parametrize('factor', [4, 8, 16])
@pytest.mark.parametrize('size', [(16, 16), (48, 32)])
def test_shapes_follow_the_factor(factor, size):
  model, x = build(factor), images(*size)
  variables = jax.eval_shape(lambda: start(model, x[:, :16, :16]))
  out = jax.eval_shape(lambda variables: apply(model, variables, x), variables)
  assert out.reconstruction.shape == x.shape
  assert out.quantizer.ids.shape == (2, size[0] // factor, size[1] // factor)


@pytest.mark.parametrize(
  'dtype', [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  'ema', [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_decode_of_encode_is_the_reconstruction_bit_exact(dtype, ema):
  model, x = build(dtype=dtype, ema=ema), images()
  variables = init(model, x)
  ids = apply(model, variables, x, method='encode')
  assert ids.dtype == jnp.int32
  got = apply(model, variables, ids, method='decode')
  want = apply(model, variables, x).reconstruction
  assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_reconstruction_is_float32_in_range_and_state_is_float32():
  model, x = build(dtype=jnp.bfloat16), images()
  variables = init(model, x)
  out = apply(model, variables, x)
  assert out.reconstruction.dtype == jnp.float32
  assert np.abs(out.reconstruction).max() <= 1
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_evaluation_leaves_every_collection_as_it_was():
  model, x = build(), images()
  variables = init(model, x)
  _, updates = jax.jit(
    lambda v: model.apply(v, x, mutable=['params', 'batch_stats', 'codebook'])
  )(variables)
  for a, b in zip(*map(jax.tree.leaves, (updates, variables)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_every_parameter_gets_a_gradient():
  model, x = build(init_from='normal'), images()
  variables = init(model, x)

  @jax.jit
  def gradient(params):
    def loss(params):
      out, _ = model.apply(
        variables | {'params': params},
        x,
        train=True,
        mutable=['batch_stats', 'codebook'],
      )
      return jnp.mean((out.reconstruction - x) ** 2) + out.quantizer.loss

    return jax.grad(loss)(params)

  # Away from the start, where the residual branches are multiplied by zero.
  rng = np.random.default_rng(0)
  grads = gradient(
    jax.tree.map(
      lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32),
      variables['params'],
    )
  )
  flat = {
    jax.tree_util.keystr(path): float(jnp.abs(g).max())
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
  }
  # A bias in front of the softmax over keys moves every score alike.
  still = [k for k, v in flat.items() if v == 0 and "'key']['bias'" not in k]
  assert not still


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 15, 16, 3), 'multiples of 4, got 15x16'),
    ((1, 16, 16, 1), r'\[B, h, w, 3\]'),
    ((16, 16, 3), r'\[B, h, w, 3\]'),
    ((1, 0, 16, 3), 'multiples of 4'),
  ],
)
def test_other_images_are_refused(shape, message):
  model = build()
  variables = init(model, images())
  with pytest.raises(ValueError, match=message):
    model.apply(variables, jnp.zeros(shape))


def test_heads_must_divide_the_channels():
  model = tiny_vqvae(widths=(4, 6), num_heads=4)
  with pytest.raises(ValueError, match='num_heads'):
    jax.eval_shape(lambda: model.init(jax.random.key(0), images()))


def test_the_papers_model_has_the_parameters_of_its_description():
  strided = sum(9 * a * b + 2 * b for a, b in ((3, 64), (64, 128), (128, 256)))
  blocks = 6 * 2 * (9 * 256**2 + 2 * 256)
  one_by_one = 256**2 + 256
  attention = 4 * one_by_one + 2 * 256
  transposed = sum(16 * a * b + b for a, b in ((256, 128), (128, 64), (64, 3)))
  norms = 2 * (128 + 64)
  want = strided + 2 * (blocks + one_by_one) + attention + transposed + norms
  shapes = jax.eval_shape(
    lambda: VQVAE().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == want
  assert shapes['codebook']['vq']['embedding'].shape == (16384, 256)


def test_the_variables_have_the_names_that_checkpoints_hold():
  norms = ('bias', 'scale'), ('mean', 'var')
  block = {'conv0': ['kernel'], 'conv1': ['kernel']}
  block |= {f'norm{i}/bn': norms[0] for i in (0, 1)}
  both = ('bias', 'kernel')
  encoder = {f'norm{i}/bn': norms[0] for i in (0, 1)} | {'out': both}
  encoder |= {'conv0': ['kernel'], 'conv1': ['kernel']}
  decoder = {'in': both, 'up0': both, 'up1': both, 'norm1/bn': norms[0]}
  decoder |= {f'attention/{n}': both for n in ('query', 'key', 'value', 'out')}
  decoder |= {'attention/norm': norms[0]}
  want = {
    f'params/{part}/{layer}/{leaf}'
    for part, layers in (('encoder', encoder), ('decoder', decoder))
    for layer, leaves in (
      layers | {f'block0/{n}': leaves for n, leaves in block.items()}
    ).items()
    for leaf in leaves
  }
  want |= {
    name.replace('params', 'batch_stats').replace(affine, moment)
    for affine, moment in zip(*norms, strict=True)
    for name in want
    if name.endswith(f'bn/{affine}')
  }
  want |= {
    f'codebook/vq/{name}'
    for name in ('embedding', 'cluster_size', 'embedding_sum')
  }
  variables = jax.eval_shape(lambda: start(build(), images()))
  assert want == {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(variables)
  }
