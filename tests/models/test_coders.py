"""Encoder and decoder: stages, norms, dtypes, statistics and refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from tiny_model import init, layer_dtypes

from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder, stage_plan
from rvq_jax.models.layers import GAINS, NORMS, SelfAttention

PARTS = pytest.mark.parametrize(
  'part', [Encoder, functools.partial(Decoder, num_heads=2)]
)
IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


def test_stage_plan_halves_log2_factor_times():
  halved = (64, 2), (128, 2), (256, 2)
  plans = (*halved[:2], (256, 1)), halved, (*halved, (256, 2))
  for factor, plan in zip((4, 8, 16), plans, strict=True):
    assert stage_plan((64, 128, 256), factor) == plan


@PARTS
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    *(
      ({'factor': factor}, f'factor: expected one of 2, 4, 8.*, got {factor}')
      for factor in (0, 3, 12, 128, -8)
    ),
    ({'widths': ()}, r'widths: expected integers .*, got \(\)'),
    ({'num_res_blocks': -1}, 'num_res_blocks: .* from 0 to 1000, got -1'),
    ({'remat': 1}, 'remat: expected True or False, got 1'),
    (
      {'norm': 'layer'},
      "norm: expected one of batch, group, group_.*, got 'layer'",
    ),
    ({'activation': 'relu'}, 'activation: expected one of leaky_relu, swish'),
    ({'norm': 'group', 'widths': (14,)}, 'norm: .* 3 groups .*, got 14;'),
    ({'norm': 'group', 'widths': (130,)}, 'norm: .* 32 groups .*, got 130;'),
  ],
)
def test_impossible_encoders_and_decoders_are_refused(part, fields, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    init.eval_shape(part(**fields), IMAGES)


@pytest.mark.parametrize('heads', [0, 4])
def test_heads_that_do_not_divide_the_channels_are_refused(heads):
  with pytest.raises(ValueError, match=f'^num_heads: .*, got {heads}'):
    init.eval_shape(Decoder(widths=(4, 6), num_heads=heads), IMAGES)


@PARTS
@pytest.mark.parametrize(
  ('fields', 'reach'),
  [((2, 8, 0), 2), ((3, 2, 1), 6)],
)
def test_convolutions_see_no_further_than_their_reach(part, fields, reach):
  widths, factor, blocks = fields
  module = part(widths=(4,) * widths, factor=factor, num_res_blocks=blocks)
  assert module.reach == reach
  encodes = isinstance(module, Encoder)
  x = np.random.default_rng(0).standard_normal((1, 19, 19, 3)).astype('f4')
  x = x.repeat(factor, 1).repeat(factor, 2) if encodes else x
  f, g = (factor, 1) if encodes else (1, factor)
  changed = x.copy()
  changed[:, 9 * f : 10 * f, 9 * f : 10 * f] += 1  # of position 9, 9

  def alone(call, args, kwargs, context):
    attends = isinstance(context.module, SelfAttention)
    return args[0] if attends else call(*args, **kwargs)

  variables = init(module, x)
  # The last norm of a block starts at 0: then its convolutions do nothing.
  variables = jax.tree.map(lambda w: w + (w == 0), variables)
  with nn.intercept_methods(alone):
    apply = jax.jit(module.apply)
    y, z = apply(variables, x), apply(variables, changed)
  _, rows, columns = np.nonzero((y != z).any(-1))
  far = np.abs(np.stack([rows, columns]) // g - 9).max()
  assert reach - 2 <= far <= reach


@PARTS
def test_only_the_last_norm_of_a_block_starts_at_zero(part):
  module = part(widths=(4, 6), factor=4, num_res_blocks=3)
  params = init(module, jnp.zeros((1, 8, 8, 3)))['params']
  scales = {
    keystr(path, simple=True, separator='/'): set(np.ravel(leaf))
    for path, leaf in tree_leaves_with_path(params)
    if path[-1].key == 'scale'
  }
  zero = {f'block{i}/norm1/bn/scale' for i in range(3)}
  assert scales == {name: {float(name not in zero)} for name in scales}
  assert zero < scales.keys()


@PARTS
def test_every_layer_computes_in_the_dtype(part):
  options = {'factor': 2, 'num_res_blocks': 1, 'dtype': jnp.bfloat16}
  modules = [part(widths=(4, 8), norm=n, **options) for n in NORMS]
  dtypes = layer_dtypes(
    *(functools.partial(init.eval_shape, x, IMAGES) for x in modules)
  )
  assert len(dtypes) > 8 and set(dtypes.values()) == {jnp.dtype('bfloat16')}


@PARTS
def test_every_layer_has_the_norm_and_the_activation(part):
  make = functools.partial(
    part, widths=(8, 8), factor=4, num_res_blocks=1, norm='group'
  )
  module = make(activation='swish')
  variables = init.eval_shape(module, IMAGES)
  assert list(variables) == ['params']
  program, other = (
    str(jax.make_jaxpr(m.apply)(variables, IMAGES)) for m in (module, make())
  )
  assert 'logistic' in program and ' = ge ' not in program
  assert 'logistic' not in other


@pytest.mark.parametrize(('norm', 'scale'), [('group', 1), ('group_blocks', 2)])
def test_only_a_stem_without_norm_keeps_the_contrast_of_an_image(norm, scale):
  encoder = Encoder(widths=(8, 8), factor=4, num_res_blocks=0, norm=norm)
  variables = init(encoder, IMAGES)
  x = np.random.default_rng(0).uniform(-0.5, 0.5, IMAGES.shape)
  x = x.astype(np.float32)
  got, want = encoder.apply(variables, 2 * x), encoder.apply(variables, x)
  np.testing.assert_allclose(got, scale * want, atol=1e-3)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize('activation', GAINS)
@pytest.mark.parametrize(
  ('part', 'name', 'side'), [(Encoder, 'conv2', 32), (Decoder, 'up1', 8)]
)
def test_stems_without_a_norm_keep_the_variance(part, name, side, activation):
  sizes = {'widths': (64, 64, 64), 'factor': 8, 'num_res_blocks': 0}
  module = part(norm='group_blocks', activation=activation, **sizes)
  x = np.random.default_rng(0).standard_normal((4, side, side, 16))
  x = x[..., :3].astype('f4') if part is Encoder else x.astype('f4')
  _, kept = module.apply(
    init(module, x),
    x,
    mutable='intermediates',
    capture_intermediates=lambda module, _: module.name == name,
  )
  (y,) = kept['intermediates'][name]['__call__']
  assert 1 < np.var(y) < 4  # at most 0.3 with LeCun's start


def test_running_statistics_move_a_tenth_of_the_way():
  x = np.random.default_rng(0).normal(3, 2, (4, 8, 8, 3)).astype(np.float32)
  encoder = Encoder(widths=(5,), factor=2, num_res_blocks=0, code_dim=6)
  _, after = encoder.apply(
    init(encoder, x),
    x,
    train=True,
    mutable=['batch_stats', 'intermediates'],
    capture_intermediates=lambda module, _: module.name == 'conv0',
  )
  (y,) = after['intermediates']['conv0']['__call__']
  got = after['batch_stats']['norm0']['bn']
  mean, var = np.mean(y, (0, 1, 2)), np.var(y, (0, 1, 2))
  np.testing.assert_allclose(got['mean'], 0.1 * mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(got['var'], 0.9 + 0.1 * var, rtol=1e-3)
