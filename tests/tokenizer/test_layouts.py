"""Names of weights in other people's files, there and back."""

import re

import jax
import numpy as np
import pytest
from errors import one_line
from flax.traverse_util import flatten_dict

from rvq_jax.models.vqgan import VQGANDecoder, VQGANEncoder
from rvq_jax.tokenizer import layouts

SMALL = {'ch': 6, 'ch_mult': [1, 2, 2], 'factor': 4, 'num_res_blocks': 1}
SMALL |= {'attn_levels': [3], 'mid_attention': True, 'z_channels': 5}
SMALL |= {'quant_kernel': 1, 'movq': False, 'codebook_size': 7, 'code_dim': 3}
NONE = {'attn_levels': None, 'mid_attention': False}
MODELS = [
  *((layout, {}) for layout in layouts.LAYOUTS),
  *((layout, {'mid_attention': False}) for layout in layouts.LAYOUTS),
  *((layout, NONE) for layout in ('taming', 'janus', 'llamagen', 'diffusers')),
  ('taming', {'attn_levels': [1, 3], 'num_res_blocks': 2}),
  ('janus', {'ch_mult': [1, 1], 'factor': 2, 'attn_levels': [2]}),
  ('var', {'quant_kernel': 3}),
  ('diffusers', {'movq': True}),
  ('diffusers', {'movq': True, 'attn_levels': [1, 2]}),
]


def arrays_of(phis=0, **fields):
  """Random arrays by the names of our parameters."""
  rng, own = np.random.default_rng(0), dict(fields)
  size, dim = own.pop('codebook_size'), own.pop('code_dim')
  own = {n: tuple(x) if isinstance(x, list) else x for n, x in own.items()}
  trees = {}
  for name, module, side, channels in (
    ('encoder', VQGANEncoder(**own, code_dim=dim), 8, 3),
    ('decoder', VQGANDecoder(**own), 2, dim),
  ):
    x = jax.ShapeDtypeStruct((1, side, side, channels), 'f4')
    trees[name] = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  shapes = {n: x.shape for n, x in flatten_dict(trees, sep='.').items()}
  shapes |= {'vq.embedding': (size, dim)}
  for i in range(phis):
    shapes |= {
      f'vq.phi_{i}.kernel': (3, 3, dim, dim),
      f'vq.phi_{i}.bias': (dim,),
    }
  return {n: rng.standard_normal(s).astype('f') for n, s in shapes.items()}


def opened(tensors):
  """Fields and arrays of a file, as the import reads it."""
  own, layout = layouts.find_network(tensors)
  fields = layouts.network_fields(own, layout)
  shapes = {n: x.shape for n, x in arrays_of(**fields).items()}
  return layout, fields, layouts.read(own, shapes, layout)


@pytest.mark.parametrize(('layout', 'changed'), MODELS, ids=str)
def test_names_give_back_the_fields_and_the_bits(layout, changed):
  fields = SMALL | changed
  arrays = arrays_of(**fields)
  tensors = layouts.write(arrays, layout)
  found, got, back = opened(tensors)
  if changed != NONE:
    assert found == layout
  assert got == fields and back.keys() == arrays.keys()
  for name in arrays:
    np.testing.assert_array_equal(back[name], arrays[name], strict=True)
  assert all(x.flags.c_contiguous for x in (*tensors.values(), *back.values()))


def test_var_has_phi_and_one_convolution_for_query_key_and_value():
  arrays = arrays_of(phis=4, **SMALL)
  own, layout = layouts.find_network(layouts.write(arrays, 'var'))
  assert own['encoder.mid.attn_1.qkv.weight'].shape == (36, 12, 1, 1)
  shapes = {n: x.shape for n, x in arrays.items()}
  back = layouts.read(own, shapes, layout)
  jax.tree.map(np.testing.assert_array_equal, back, arrays)


# The network in a file: 'X.' before its names, and what else is there.
def averages(own):
  """Of LitEma: a copy without dots, of all that learns."""
  raw = {n: x + 1 for n, x in own.items()}
  ema = {f'model_ema.{n.replace(".", "")}': x for n, x in own.items()}
  more = {
    'model_ema.decay': np.ones(()),
    'model_ema.lossmainweight': np.ones(1),
  }
  return raw | ema | more


def diffusion(own):
  """LDM: the averages are of its U-Net."""
  first = {f'first_stage_model.{n}': x for n, x in own.items()}
  unet = {'model.diffusion_model.out.weight': np.ones(1)}
  unet |= {'model_ema.diffusion_modeloutweight': np.ones(1)}
  wide = {f'cond_stage_model.{n}': x for n, x in own.items()}
  wide['cond_stage_model.encoder.conv_in.weight'] = np.ones((6, 183, 3, 3))
  return wide | first | unet


def llamagen(own):
  """Of training: the averages under 'ema'."""
  raw = {f'vq.{n}': x + 1 for n, x in own.items()}
  return raw | {f'ema.{n}': x for n, x in own.items()}


@pytest.mark.parametrize('prefix', ['', 'state_dict.', 'gen_vision_model.'])
@pytest.mark.parametrize('nest', [dict, averages, diffusion, llamagen])
def test_the_network_is_found_among_others(nest, prefix):
  arrays = arrays_of(**SMALL)
  tensors = nest(layouts.write(arrays, 'taming'))
  for name in 'codebook_used', 'ema_vocab_hit_SV', 'embedding.cluster_size':
    tensors[f'quantize.{name}'] = np.ones(7)
  tensors |= {'loss.discriminator.main.0.weight': np.ones((4, 3, 4, 4))}
  tensors |= {'loss.encoder.conv_in.weight': np.ones((4, 3, 4, 4))}
  tensors = {prefix + n: x for n, x in tensors.items()}
  _, fields, back = opened(tensors | {'other.weight': np.ones(2)})
  assert fields == SMALL
  jax.tree.map(np.testing.assert_array_equal, back, arrays)


# Written from the authors' sources. Ours, for three levels:
OURS = """encoder.conv_in.kernel encoder.level0_block0.norm1.norm.scale
encoder.level1_block0.conv2.bias encoder.level1_block0.shortcut.kernel
encoder.level0_down.kernel encoder.level2_attn0_norm.norm.bias
encoder.level2_attn0.query.kernel encoder.level2_attn0.key.bias
encoder.level2_attn0.value.kernel encoder.level2_attn0.out.bias
encoder.mid_block1.conv1.kernel encoder.mid_attn_norm.norm.scale
encoder.mid_block2.norm2.norm.bias encoder.norm_out.norm.scale
encoder.conv_out.kernel encoder.quant_conv.kernel vq.embedding
decoder.post_quant_conv.bias decoder.level0_block1.conv1.kernel
decoder.level2_block0.conv2.kernel decoder.level2_attn1.out.kernel
decoder.level2_up.kernel decoder.mid_attn.key.kernel
decoder.norm_out.norm.bias decoder.conv_out.kernel""".split()
TAMING = """encoder.conv_in.weight encoder.down.0.block.0.norm1.weight
encoder.down.1.block.0.conv2.bias encoder.down.1.block.0.nin_shortcut.weight
encoder.down.0.downsample.conv.weight encoder.down.2.attn.0.norm.bias
encoder.down.2.attn.0.q.weight encoder.down.2.attn.0.k.bias
encoder.down.2.attn.0.v.weight encoder.down.2.attn.0.proj_out.bias
encoder.mid.block_1.conv1.weight encoder.mid.attn_1.norm.weight
encoder.mid.block_2.norm2.bias encoder.norm_out.weight
encoder.conv_out.weight quant_conv.weight quantize.embedding.weight
post_quant_conv.bias decoder.up.0.block.1.conv1.weight
decoder.up.2.block.0.conv2.weight decoder.up.2.attn.1.proj_out.weight
decoder.up.2.upsample.conv.weight decoder.mid.attn_1.k.weight
decoder.norm_out.bias decoder.conv_out.weight""".split()
LLAMAGEN = """encoder.conv_in.weight encoder.conv_blocks.0.res.0.norm1.weight
encoder.conv_blocks.1.res.0.conv2.bias
encoder.conv_blocks.1.res.0.nin_shortcut.weight
encoder.conv_blocks.0.downsample.conv.weight
encoder.conv_blocks.2.attn.0.norm.bias encoder.conv_blocks.2.attn.0.q.weight
encoder.conv_blocks.2.attn.0.k.bias encoder.conv_blocks.2.attn.0.v.weight
encoder.conv_blocks.2.attn.0.proj_out.bias encoder.mid.0.conv1.weight
encoder.mid.1.norm.weight encoder.mid.2.norm2.bias encoder.norm_out.weight
encoder.conv_out.weight quant_conv.weight quantize.embedding.weight
post_quant_conv.bias decoder.conv_blocks.2.res.1.conv1.weight
decoder.conv_blocks.0.res.0.conv2.weight
decoder.conv_blocks.0.attn.1.proj_out.weight
decoder.conv_blocks.0.upsample.conv.weight decoder.mid.1.k.weight
decoder.norm_out.bias decoder.conv_out.weight""".split()
DIFFUSERS = """encoder.conv_in.weight
encoder.down_blocks.0.resnets.0.norm1.weight
encoder.down_blocks.1.resnets.0.conv2.bias
encoder.down_blocks.1.resnets.0.conv_shortcut.weight
encoder.down_blocks.0.downsamplers.0.conv.weight
encoder.down_blocks.2.attentions.0.group_norm.bias
encoder.down_blocks.2.attentions.0.to_q.weight
encoder.down_blocks.2.attentions.0.to_k.bias
encoder.down_blocks.2.attentions.0.to_v.weight
encoder.down_blocks.2.attentions.0.to_out.0.bias
encoder.mid_block.resnets.0.conv1.weight
encoder.mid_block.attentions.0.group_norm.weight
encoder.mid_block.resnets.1.norm2.bias encoder.conv_norm_out.weight
encoder.conv_out.weight quant_conv.weight quantize.embedding.weight
post_quant_conv.bias decoder.up_blocks.2.resnets.1.conv1.weight
decoder.up_blocks.0.resnets.0.conv2.weight
decoder.up_blocks.0.attentions.1.to_out.0.weight
decoder.up_blocks.0.upsamplers.0.conv.weight
decoder.mid_block.attentions.0.to_k.weight decoder.conv_norm_out.bias
decoder.conv_out.weight""".split()
NAMES = {'taming': TAMING, 'llamagen': LLAMAGEN, 'diffusers': DIFFUSERS}
NAMES['var'] = [re.sub(r'\.[qkv]\.', '.qkv.', n) for n in TAMING]
_turned = {'up.0': 'up.2', 'up.2': 'up.0'}  # up.1 stays
NAMES['janus'] = [re.sub(r'up\.\d', lambda m: _turned[m[0]], n) for n in TAMING]
_old = {
  'to_q': 'query',
  'to_k': 'key',
  'to_v': 'value',
  'to_out.0': 'proj_attn',
}
NAMES['diffusers_2022'] = [
  re.sub(r'to_(q|k|v|out\.0)', lambda m: _old[m[0]], n) for n in DIFFUSERS
]
MOVQ = {
  'decoder.level2_block0.norm1.scale.kernel': (
    'decoder.up_blocks.0.resnets.0.norm1.conv_y.weight'
  ),
  'decoder.mid_block2.norm2.norm.bias': (
    'decoder.mid_block.resnets.1.norm2.norm_layer.bias'
  ),
  'decoder.level2_attn0_norm.shift.bias': (
    'decoder.up_blocks.0.attentions.0.spatial_norm.conv_b.bias'
  ),
  'decoder.norm_out.norm.scale': 'decoder.conv_norm_out.norm_layer.weight',
  'encoder.norm_out.norm.scale': 'encoder.conv_norm_out.weight',
}


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_names_are_those_of_the_authors(layout):
  wanted = dict(zip(OURS, NAMES[layout], strict=True))
  assert {n: layouts.their_name(layout, n, 3) for n in OURS} == wanted
  if layout == 'diffusers':
    assert {n: layouts.their_name(layout, n, 3, True) for n in MOVQ} == MOVQ


TABLE = 'quantize.embedding.weight'
BLOCK = 'encoder.down.0.block.0.conv1.weight'


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({TABLE: None}, r'an autoencoder without a table of codes \(KL or LFQ\)'),
    ({TABLE: np.ones(7)}, 'an autoencoder without a table of codes'),
    ({TABLE: None, 'quantize.proj.weight': np.ones(1)}, 'Gumbel'),
    ({BLOCK: None}, 'expected the weights of a VQGAN'),
    (
      {'decoder.conv_out.bias': None},
      'a tensor decoder.conv_out.bias, got none',
    ),
    ({'encoder.x.weight': np.ones(1)}, 'no place for encoder.x.weight'),
    ({'quantize.used': np.ones(1)}, 'no place for quantize.used'),
    ({'decoder.conv_out.bias': np.ones(4)}, r'conv_out.bias: the shape \(4,\)'),
    ({TABLE: np.ones((7, 4))}, 'quant_conv.*: the shape'),
    ({'encoder.conv_in.weight': np.ones((6, 183, 3, 3))}, '183 channels'),
  ],
)
def test_what_is_wrong_with_a_network_is_named(changed, message):
  tensors = layouts.write(arrays_of(**SMALL), 'taming') | changed
  with one_line(message):
    opened({n: x for n, x in tensors.items() if x is not None})


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('model.diffusion_model.out.0.weight', 'a diffusion model without'),
    ('encoder.blocks.0.attn.qkv.weight', 'a transformer, or a ViT tokenizer'),
    ('latent_tokens', 'TiTok, whose tokens have one dimension'),
    ('layer1.weight', "tensors such as 'layer1.weight'"),
  ],
)
def test_another_kind_of_model_is_named(name, message):
  with one_line(f'expected the weights of a VQGAN .*, got {message}'):
    opened({name: np.ones(1)})
