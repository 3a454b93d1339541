"""Random weights through the authors' own code in PyTorch, and through ours.

Norms have random scales and biases, so that no mix-up goes unseen. Theirs runs
in float64: what differs is our rounding.
"""

import os
import re

import numpy as np
import pytest
from errors import one_line

from rvq_jax.tokenizer.export import export_run
from rvq_jax.tokenizer.load import import_model

os.environ['HF_HUB_OFFLINE'] = '1'
torch = pytest.importorskip('torch', reason='no torch: pip install torch')
diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')
taming = pytest.importorskip('taming.modules.diffusionmodules.model')
nearest = pytest.importorskip('taming.modules.vqvae.quantize').VectorQuantizer
F, nn = torch.nn.functional, torch.nn

pytestmark = pytest.mark.usefixtures('one_device')
K, Z, D, SIDE = 64, 16, 8, 16
SIDES = (1, 2, 3, 4, 6, 8)
COMMON = {'num_res_blocks': 1, 'latent_channels': Z, 'embed_dim': D}
COMMON |= {'base_channels': 32, 'channel_multiplier': [1, 2]}
COMMON |= {'num_embeddings': K}
BLOCKS = {'block_out_channels': (32, 64), 'latent_channels': D}
BLOCKS |= {'num_vq_embeddings': K}
_two = lambda name, *ends: tuple(f'{end}{name}' for end in ends)  # noqa: E731
DOWN = {'down_block_types': _two('DownEncoderBlock2D', '', 'Attn')}
UP = {'up_block_types': _two('UpDecoderBlock2D', 'Attn', '')}
PLAIN = {'down_block_types': _two('DownEncoderBlock2D', '', '')}
PLAIN |= {'up_block_types': _two('UpDecoderBlock2D', '', '')}


class Taming(nn.Module):
  """taming's VQModel, which itself needs PyTorch Lightning."""

  def __init__(self, kernel=1, attention=(8,)):
    super().__init__()
    about = {'ch': 32, 'ch_mult': (1, 2), 'num_res_blocks': 1, 'out_ch': 3}
    about |= {'attn_resolutions': attention, 'resolution': SIDE}
    about |= {'in_channels': 3, 'z_channels': Z}
    self.encoder = taming.Encoder(**about, double_z=False)
    self.decoder = taming.Decoder(**about)
    self.quantize = nearest(K, D, 0.25)
    self.quant_conv = nn.Conv2d(Z, D, kernel, padding=kernel // 2)
    self.post_quant_conv = nn.Conv2d(D, Z, kernel, padding=kernel // 2)


class Chameleon(nn.Module):
  """Its encoder; transformers lacks the decoder, which is taming's."""

  def __init__(self):
    super().__init__()
    config = transformers.ChameleonVQVAEConfig(**COMMON, resolution=SIDE)
    self.__dict__['theirs'] = transformers.ChameleonVQVAE(config)
    parts = 'encoder', 'quant_conv', 'quantize', 'post_quant_conv'
    for name in parts:
      setattr(self, name, getattr(self.theirs, name))
    self.decoder = Taming(attention=()).decoder


def randomized(module):
  """The module with random weights in float64, exact in float32."""
  torch.manual_seed(0)
  for name, x in module.named_parameters():
    noise = torch.randn(x.shape)
    if x.ndim == 1:
      noise = 0.3 * noise + name.endswith('weight')
    else:
      noise *= 0.5 if 'embedding' in name else x[0].numel() ** -0.5
    x.data = noise
  return module.double().eval()


def latents(module, x):
  return module.quant_conv(module.encoder(x))


def decoded(module, codes):
  """Images of codes [B, H, W, D]."""
  codes = codes.permute(0, 3, 1, 2)
  z = module.post_quant_conv(codes)
  if getattr(getattr(module, 'config', None), 'norm_type', '') == 'spatial':
    return module.decoder(z, codes)
  return module.decoder(z)


def euclidean(module, z):
  """Ids and codes, by the package's own quantizer."""
  ids = module.quantize(z)[2]
  ids = (ids[2] if isinstance(ids, tuple) else ids).reshape(-1)
  codes = module.quantize.embedding.weight[ids]
  return ids, codes.reshape(len(z), *z.shape[2:], D)


def cosine(module, z):
  """LlamaGen: ids and codes of unit norm."""
  table = F.normalize(module.quantize.embedding.weight, dim=-1)
  z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
  ids = (z @ table.T).argmax(-1)
  return ids, table[ids]


def inner_product(module, z):
  """IBQ."""
  table = module.quantize.embedding.weight
  ids = (z.permute(0, 2, 3, 1) @ table.T).argmax(-1)
  return ids, table[ids]


def var(module, z):
  """VAR: ids of all scales, and the grid that they add to."""
  table, ids, rest = module.quantize.embedding.weight, [], z
  ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
  for i, side in enumerate(SIDES):
    last = i + 1 == len(SIDES)
    small = rest if last else F.interpolate(rest, (side, side), mode='area')
    far = (small.permute(0, 2, 3, 1)[..., None, :] - table).square().sum(-1)
    ids.append(far.argmin(-1).flatten(1))
    h = table[ids[-1]].reshape(len(z), side, side, D).permute(0, 3, 1, 2)
    h = h if last else F.interpolate(h, z.shape[2:], mode='bicubic')
    nearest_tick = np.argmin(np.abs(ticks - i / (len(SIDES) - 1)))
    phi = module.quantize.quant_resi.qresi_ls[nearest_tick]
    rest = rest - h / 2 - phi(h) / 2
  return torch.cat(ids, 1), (z - rest).permute(0, 2, 3, 1)


def with_phi():
  module, phis = Taming(kernel=3), nn.Module()
  phis.qresi_ls = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(4))
  module.quantize.quant_resi = phis
  return module


def as_var(state):
  """VAR's names: query, key and value in one convolution."""
  fused = {}
  for name, x in state.items():
    name = re.sub(r'\.([qkv])\.(?=weight|bias)', '.qkv.', name)
    fused.setdefault(name, []).append(x)
  return {name: torch.cat(x) for name, x in fused.items()}


def as_llamagen(state):
  """LlamaGen's names: the decoder's levels by execution."""
  parts = {'block_1': '0', 'attn_1': '1', 'block_2': '2'}
  rules = (
    (r'\.down\.', '.conv_blocks.'),
    (r'\.up\.(\d)', lambda match: f'.conv_blocks.{1 - int(match[1])}'),
    (r'\.block\.', '.res.'),
    (r'(?<=mid\.)\w+_\d', lambda match: parts[match[0]]),
  )
  named = {}
  for name, x in state.items():
    for pattern, text in rules:
      name = re.sub(pattern, text, name)
    named[name] = x
  return {'ema': named, 'model': {n: x + 1 for n, x in named.items()}}


def as_lightning(state):
  return {'state_dict': state, 'epoch': 3}


def of_transformers(state):
  return {f'model.vqmodel.{n}': x for n, x in state.items()}


def janus():
  return transformers.JanusVQVAE(
    transformers.JanusVQVAEConfig(**COMMON, num_patches=SIDE // 2)
  )


def vq_model(**fields):
  return diffusers.VQModel(**BLOCKS | DOWN | UP | fields)


CASES = {
  'taming': (Taming, euclidean, as_lightning),
  'ibq': (Taming, inner_product, dict),
  'llamagen': (Taming, cosine, as_llamagen),
  'var': (with_phi, var, as_var),
  'janus': (janus, cosine, of_transformers),
  'chameleon': (Chameleon, euclidean, of_transformers),
  'diffusers': (vq_model, euclidean, dict),
  'movq': (lambda: vq_model(norm_type='spatial'), euclidean, dict),
  'amused': (
    lambda: vq_model(
      **PLAIN, mid_block_add_attention=False, layers_per_block=2
    ),
    *(euclidean, dict),
  ),
}


@pytest.fixture
def build(tmp_path):
  """Returns a function: a case -> their module, and ours of its file."""

  def build(name, drop=()):
    make, rule, nest = CASES[name]
    module, path = randomized(make()), tmp_path / f'{name}.pt'
    state = {n: x.float() for n, x in module.state_dict().items()}
    state = {n: x for n, x in state.items() if not n.startswith(drop or '-')}
    torch.save(nest(state), path)
    options = {'sides': SIDES, 'rule': 'euclidean'} if rule is var else {}
    options = options or {'rule': rule.__name__}
    return module, import_model(path, image_size=SIDE, **options)

  return build


@pytest.mark.parametrize('name', CASES)
def test_ids_latents_and_pixels_are_theirs(name, build):
  module, ours = build(name)
  x = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
  x = x.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
  images = torch.from_numpy(x / 127.5 - 1).permute(0, 3, 1, 2)
  with torch.no_grad():
    z = latents(module, images)
    ids, codes = CASES[name][1](module, z)
    pixels = decoded(module, codes).permute(0, 2, 3, 1).numpy()
    z = z.permute(0, 2, 3, 1).numpy()
  call, variables = ours.model.apply, ours.variables
  got = call(variables, np.float32(x / 127.5 - 1), method='latents')
  assert np.abs(got - z).max() <= 1e-5 * np.ptp(z)
  got = np.asarray(ours.encode(x))
  np.testing.assert_array_equal(got, ids.numpy().reshape(got.shape))
  assert len(np.unique(got)) > 8  # not a few codes for all
  grid = ours.grid(got)
  got = call(
    variables, grid, method=lambda model, z: model.decoder(z, train=True)
  )
  assert np.abs(got - pixels).max() <= 1e-4 < 1 < np.abs(pixels).max()


@pytest.mark.parametrize('name', ['diffusers', 'movq', 'amused'])
def test_diffusers_opens_what_we_write(name, build, tmp_path):
  module, ours = build(name)
  export_run('.', tmp_path / 'out', tokenizer=ours, layout='diffusers')
  theirs = diffusers.VQModel.from_pretrained(tmp_path / 'out')
  state = module.state_dict()
  assert theirs.state_dict().keys() == state.keys()
  for name, x in theirs.state_dict().items():
    assert torch.equal(x, state[name].float()), name
  x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
  with torch.no_grad():
    assert torch.equal(theirs.double()(x).sample, module(x).sample)


def test_an_encoder_without_its_decoder_is_named(build):
  with one_line('expected a tensor decoder.*, got none'):
    build('chameleon', drop='decoder.')
