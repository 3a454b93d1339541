"""The network of the VQGAN family: resampling, sizes, options, refusals."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tiny_model import init, layer_dtypes

from rvq_jax import VQVAE, MultiscaleQuantizer, VectorQuantizer
from rvq_jax.models.layers import SelfAttention, Upsample
from rvq_jax.models.vqgan import VQGANDecoder, VQGANEncoder

FIELDS = {'ch': 8, 'ch_mult': (1, 2), 'factor': 2, 'num_res_blocks': 1}
FIELDS |= {'z_channels': 6, 'attn_levels': (2,), 'quant_kernel': 3}
SMALL = {'ch': 4, 'ch_mult': (1, 1), 'factor': 2, 'num_res_blocks': 0}
PARTS = pytest.mark.parametrize(
  'part', [VQGANEncoder, VQGANDecoder], ids=['encoder', 'decoder']
)


def images(*shape, low=-1):
  return np.random.default_rng(0).uniform(low, 1, shape).astype('f')


def active(module, x):
  """Variables of which none is 0 or 1, which would hide a layer."""
  rng, shapes = np.random.default_rng(1), init.eval_shape(module, x)
  draw = lambda w: rng.uniform(0.1, 0.4, w.shape).astype('f')  # noqa: E731
  return jax.tree.map(draw, shapes)


quick = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@pytest.mark.parametrize('up', [True, False])
def test_resampling_is_one_convolution_of_repeated_or_every_other_values(up):
  x = images(2, 6, 8, 3 if not up else 4)
  module = Upsample(4, side=3) if up else VQGANEncoder(**SMALL)
  variables = active(module, x)
  got, taken = module.apply(variables, x, capture_intermediates=True)
  layer, wide = variables['params'], x.repeat(2, 1).repeat(2, 2)
  if not up:
    layer, taken = layer['level0_down'], taken['intermediates']
    got, wide = (taken[n]['__call__'][0] for n in ('level0_down', 'conv_in'))
  wide = np.pad(wide, ((0, 0), *[(int(up), 1)] * 2, (0, 0)))
  parts = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2))
  parts = parts if up else parts[:, ::2, ::2]
  want = np.einsum('bhwcij,ijcd->bhwd', parts.astype(float), layer['kernel'])
  np.testing.assert_allclose(got, want + layer['bias'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('fields', 'dim', 'size', 'count'),
  [
    ({'attn_levels': (5,)}, 8, 16384, 71_883_403),  # LlamaGen's VQ-16
    ({'ch_mult': (1, 2, 2, 4), 'attn_levels': (4,)}, 8, 16384, 70_109_835),
    pytest.param(
      {'ch': 160, 'attn_levels': (5,), 'z_channels': 32, 'quant_kernel': 3},
      *(32, 4096, 108_948_355),  # VAR's, with phi
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'ch_mult': (1, 2, 2, 4, 6), 'mid_attention': False, 'z_channels': 64},
      *(64, 8192, 146_244_675),  # of aMUSEd
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'ch_mult': (1, 2, 2, 4), 'attn_levels': (4,), 'z_channels': 4}
      | {'movq': True},
      *(4, 16384, 67_832_495),  # of Kandinsky
      marks=pytest.mark.slow,
    ),
  ],
)
def test_known_models_have_their_number_of_parameters(fields, dim, size, count):
  fields = {'ch_mult': (1, 1, 2, 2, 4), 'num_res_blocks': 2} | fields
  fields['factor'] = 2 ** (len(fields['ch_mult']) - 1)
  var = {'sides': (1, 2, 3, 4)} if 'ch' in fields else {}
  quantizer = MultiscaleQuantizer if var else VectorQuantizer
  vq = quantizer(codebook_size=size, ema=False, **var)
  coders = VQGANEncoder(code_dim=dim, **fields), VQGANDecoder(**fields)
  side = 4 * fields['factor']
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  params = init.eval_shape(VQVAE(coders[0], vq, coders[1]), x)['params']
  assert sum(math.prod(w.shape) for w in jax.tree.leaves(params)) == count


@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients():
  x, results = images(1, 4, 4, 3), []
  for remat in (False, True):
    module = VQGANEncoder(**SMALL, remat=remat)
    variables = active(module, x)
    program = str(jax.make_jaxpr(module.apply)(variables, x))
    assert ('remat' in program) == remat
    loss = jax.value_and_grad(lambda v, m=module: (m.apply(v, x) ** 2).sum())
    results.append(quick(loss)(variables))
  plain, again = (ravel_pytree(x)[0] for x in results)
  np.testing.assert_allclose(plain, again, atol=1e-4 * np.abs(plain).max())


@PARTS
def test_every_layer_computes_in_the_dtype(part):
  module = part(**FIELDS, movq=True, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  dtypes = layer_dtypes(lambda: init.eval_shape(module, x))
  assert len(dtypes) > 20 and set(dtypes.values()) == {jnp.dtype('bfloat16')}


def test_images_in_0_to_1_and_clipping_in_evaluation_alone():
  encoder, decoder = VQGANEncoder(code_dim=5, **SMALL), VQGANDecoder(**SMALL)
  x = images(2, 10, 6, 3)
  variables = active(encoder, x)
  z = quick(encoder.clone(unit_range=True).apply)(variables, x)
  assert z.shape == (2, 5, 3, 5)
  want = quick(encoder.apply)(variables, (x + 1) / 2)
  np.testing.assert_allclose(z, want, rtol=1e-4, atol=1e-4)
  variables = active(decoder, z)
  unit = decoder.clone(unit_range=True)
  plain, ours = (
    quick(functools.partial(m.apply, train=True))(variables, z)
    for m in (decoder, unit)
  )
  assert plain.shape == x.shape and np.abs(plain).max() > 1
  np.testing.assert_allclose(ours, 2 * plain - 1, atol=1e-5)
  clipped = quick(unit.apply)(variables, z)
  np.testing.assert_array_equal(clipped, ours.clip(-1, 1))


@PARTS
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'factor': 4}, 'factor: expected 2 for the 2 levels .*, got 4'),
    ({'attn_levels': (1, 3)}, r'attn_levels: .* from 1 to 2, got \(1, 3\)'),
    ({'attn_levels': (0,)}, 'attn_levels: expected .*, got'),
    ({'ch_mult': ()}, r'ch_mult: expected .*, got \(\)'),
    ({'ch_mult': (1, 0)}, r'ch_mult: expected .*, got \(1, 0\)'),
    ({'quant_kernel': 2}, 'quant_kernel: expected one of 1, 3, got 2'),
    ({'z_channels': 0}, 'z_channels: expected .*, got 0'),
  ],
)
def test_impossible_networks_are_refused(part, fields, message):
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  with pytest.raises(ValueError, match=f'^{message}'):
    init.eval_shape(part(**FIELDS | fields), x)


@PARTS
def test_convolutions_see_no_further_than_their_reach(part):
  module = part(**FIELDS)
  f, g = (2, 1) if part is VQGANEncoder else (1, 2)
  x = images(1, 61 * f, 61 * f, 3)
  changed = x.copy()
  changed[:, 30 * f : 31 * f, 30 * f : 31 * f] += 1

  def alone(call, args, kwargs, context):
    skipped = isinstance(context.module, SelfAttention | nn.GroupNorm)
    return args[0] if skipped else call(*args, **kwargs)

  variables = active(module, x)
  with nn.intercept_methods(alone):
    apply = quick(functools.partial(module.apply, train=True))
    y, z = apply(variables, x), apply(variables, changed)
  _, rows, columns = np.nonzero((y != z).any(-1))
  far = np.abs(np.stack([rows, columns]) // g - 30).max()
  assert module.reach / 2 < far <= module.reach < 25
