"""Other people's tokenizers: their files, rules and configs.

It reads files as data (`torch_files`) and never runs them; see docs/zoo.md.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rvq_jax.io import read_json
from rvq_jax.tokenizer import layouts
from rvq_jax.training.config import completed

DIFFUSERS = 'diffusion_pytorch_model'
RULES = 'euclidean', 'cosine', 'inner_product'
_ENDINGS = '.safetensors', '.ckpt', '.pt', '.pth', '.bin'
_VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Known(NamedTuple):
  """Facts that a file lacks, and the files to fetch from the Hub."""

  rule: str
  files: tuple[str, ...] = ()
  image_size: int = 256
  unit_range: bool = False


# Name on the Hub, files, rule; side in pixels unless 256; range if [0,1].
_TABLE = """
FoundationVision/vq-ds16-c2i model.safetensors cosine
FoundationVision/LlamaGen vq_ds16_c2i.pt cosine
- vq_ds8_c2i.pt cosine
peizesun/llamagen_t2i vq_ds16_t2i.pt cosine
deepseek-ai/Janus-1.3B *.safetensors,*.bin cosine 384
deepseek-ai/Janus-Pro-1B *.safetensors,*.bin cosine 384
deepseek-ai/Janus-Pro-7B *.safetensors,*.bin cosine 384
deepseek-community/Janus-Pro-1B *.safetensors cosine 384
FoundationVision/var vae_ch160v4096z32.pth euclidean
TencentARC/IBQ-Tokenizer-1024 imagenet256_1024.ckpt inner_product
TencentARC/IBQ-Tokenizer-8192 imagenet256_8192.ckpt inner_product
TencentARC/IBQ-Tokenizer-16384 imagenet256_16384.ckpt inner_product
TencentARC/IBQ-Tokenizer-262144 imagenet256_262144.ckpt inner_product
TencentARC/IBQ-Tokenizer-16384-Pretrain IBQ_pretrain_16384.ckpt inner_product
TencentARC/IBQ-Tokenizer-262144-Pretrain IBQ_pretrain_262144.ckpt inner_product
BAAI/Emu3.5-VisionTokenizer model.ckpt inner_product
amused/amused-256 vqvae/* euclidean [0,1]
amused/amused-512 vqvae/* euclidean 512 [0,1]
CompVis/ldm-celebahq-256 vqvae/* euclidean
microsoft/vq-diffusion-ithq vqvae/* euclidean
kandinsky-community/kandinsky-2-1 movq/* euclidean 512
kandinsky-community/kandinsky-2-2-decoder movq/* euclidean 512
GAIR/Anole-7b-v0.1 tokenizer/vqgan.ckpt euclidean 512
"""


def _known():
  table = {}
  for line in filter(None, _TABLE.split('\n')):
    name, files, rule, *more = line.split()
    size = next((int(x) for x in more if x.isdigit()), 256)
    known = Known(rule, tuple(files.split(',')), size, '[0,1]' in more)
    table[name] = known
    if '_' in files:  # a unique name: known without the folder, too
      table[files] = known
  return table


KNOWN = _known()
"""Name on the Hub, or of a file -> its authors' settings."""


def hint(name: str) -> str:
  """Tells how to open a model on the Hub without a network."""
  files, known = ' or '.join(patterns(name)), KNOWN.get(name)
  flags = known and f' --rule={known.rule}' + ' --unit_range' * known.unit_range
  return f'fetch {files} of {name} elsewhere; rvq import FILE{flags or ""}'


def patterns(name: str) -> list[str]:
  """The files to fetch for a model on the Hub."""
  if name in KNOWN:
    return list(KNOWN[name].files)
  return [f'*{ending}' for ending in _ENDINGS]


class Network(NamedTuple):
  """Tensors with the names of a layout; the flat config of their model."""

  tensors: dict[str, np.ndarray]
  layout: str
  config: dict[str, Any]


def open_network(
  path: Path,
  name: str,
  *,
  rule=None,
  sides=None,
  image_size=None,
  unit_range=False,
) -> Network:
  """Reads and describes the network in a file.

  Args:
    path: a file with weights, or a folder with some.
    name: as in `KNOWN`, for messages and the config.
    rule, sides, image_size: one of `RULES`; sides of multi-scale tokens;
      pixels. None: as known.
    unit_range: the network takes images in [0, 1].

  Raises:
    ValueError: the file holds something else, or its rule is unknown.
  """
  from rvq_jax.tokenizer.torch_files import read_tensors

  if rule not in (None, *RULES):
    raise ValueError(f'rule: expected {", ".join(RULES)}, got {rule!r}')
  files = _files(path)
  tensors: dict[str, np.ndarray] = {}
  for file in files:
    tensors |= read_tensors(file)
  try:
    network, layout = layouts.find_network(tensors)
    fields = layouts.network_fields(network, layout)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  known = _known_of(path, name, layout, rule, files[0].with_name('config.json'))
  rule, size = rule or known.rule, image_size or known.image_size
  fields |= {
    'network': 'vqgan',
    'unit_range': unit_range or known.unit_range,
    'quantizer': 'vq',
    'cosine': rule == 'cosine',
    'inner_product': rule == 'inner_product',
    'ema': False,
    'estimator': 'ste',
  }
  if 'quantize.quant_resi.qresi_ls.0.weight' in network:  # multi-scale codes
    sides = sides or _VAR_SIDES
    size = fields['factor'] * sides[-1]
    fields |= {'quantizer': 'multiscale', 'sides': sides, 'resize': 'torch'}
    hits = [x for n, x in tensors.items() if n.endswith('ema_vocab_hit_SV')]
    if hits and len(hits[0]) != len(sides):
      raise ValueError(
        f'{path}: expected the sides of {len(hits[0])} scales, got {sides}; '
        'pass --sides'
      )
  if image_size not in (None, size) or size % fields['factor']:
    raise ValueError(
      f'image_size: expected a multiple of {fields["factor"]} (for multi-scale '
      f'codes, times the last of their sides), got {image_size}'
    )
  flat = {f'model.{name}': value for name, value in fields.items()}
  flat |= {'data.name': f'import:{name}', 'data.image_size': size}
  flat |= {'data.split': 'unknown', 'batch_size': 128, 'model.dtype': 'float32'}
  return Network(network, layout, completed(flat, path))


def _known_of(path, name, layout, rule, about) -> Known:
  """Known facts about a file; ValueError if even the rule is unknown."""
  known = KNOWN.get(name) or KNOWN.get(path.name)
  if layout.startswith('diffusers'):
    about = (read_json(about) if about.is_file() else None) or {}
    if (groups := about.get('norm_num_groups', 32)) != 32:
      raise ValueError(f'{path}: expected 32 groups of GroupNorm, got {groups}')
    size = about.get('sample_size', 256)
    known = known or Known('euclidean', image_size=size)
  if not (rule or known):
    raise ValueError(
      f'{path}: the file does not tell how to choose codes; pass --rule='
      f'{"|".join(RULES)}: taming, LDM and VAR have euclidean, LlamaGen and '
      'Janus cosine, IBQ inner_product'
    )
  return known or Known(rule)


def fill(network: Network, shapes, count: float) -> dict[str, Any]:
  """The variables of these shapes; each code has a cluster_size of `count`."""
  params = flatten_dict(shapes['params'], sep='.')
  named = {name: x.shape for name, x in params.items()}
  params = layouts.read(network.tensors, named, network.layout)
  codebook = {
    name: np.full(x.shape, count if name == 'cluster_size' else 0, x.dtype)
    for name, x in shapes['codebook']['vq'].items()
  }
  params = unflatten_dict(params, sep='.')
  return {'params': params, 'batch_stats': {}, 'codebook': {'vq': codebook}}


def _files(path):
  """The files of weights at a path, all of one kind."""
  if path.is_file():
    return [path]
  for ending in _ENDINGS:
    names = sorted(path.glob(f'*{ending}')) + sorted(path.glob(f'*/*{ending}'))
    if kept := [x for x in names if not x.name.endswith(f'.fp16{ending}')]:
      return kept
  raise ValueError(
    f'{path}: expected a file of weights, or a folder with one '
    f'({", ".join(_ENDINGS)}), got neither'
  )


def write_layout(folder: Path, tokenizer, layout: str) -> None:
  """Writes the weights of a model with other programs' names.

  Args:
    folder: receives the files.
    tokenizer: a `Tokenizer` with the network `models.vqgan`.
    layout: 'diffusers': config.json and weights for its
      `VQModel.from_pretrained`; 'original': model.safetensors with VAR's names
      for multi-scale codes, LlamaGen's for cosine, else taming's.

  Raises:
    ValueError: the program cannot express the model.
  """
  import safetensors.numpy

  if layout not in ('original', 'diffusers'):
    raise ValueError(f'layout: expected original or diffusers, got {layout!r}')
  encoder, vq = tokenizer.model.encoder, tokenizer.model.vq
  arrays = flatten_dict(tokenizer.variables, sep='.')
  named = {n.removeprefix('params.'): x for n, x in arrays.items()}
  cosine, sides = getattr(vq, 'cosine', False), tokenizer.sides
  if not hasattr(encoder, 'ch_mult'):
    faults = {'another network': True}
  else:
    faults = {
      f'codes of {tokenizer.quantizer}': tokenizer.quantizer
      not in ('vq', 'multiscale'),
      'linear layers around the codes': 'vq.project_in.kernel' in named,
      'channels that 32 groups do not divide': encoder.ch % 32,
      "resize='keys'": sides and vq.resize == 'keys',
    }
  if layout == 'diffusers' and not any(faults.values()):
    faults = {
      'multi-scale codes': sides,
      'codes by cosine': cosine,
      'codes by inner product': vq.inner_product,
      'a 3x3 convolution to the codes': encoder.quant_kernel > 1,
      'a first level wider than ch': encoder.ch_mult[0] > 1,
      'movq with z_channels unlike code_dim': encoder.movq
      and encoder.z_channels != encoder.code_dim,
    }
  if reasons := [name for name, there in faults.items() if there]:
    raise ValueError(
      f'--layout={layout} cannot express this model: {", ".join(reasons)}'
    )
  names = {n: x for n, x in named.items() if not n.startswith('codebook.')}
  codes = named.get('codebook.vq.embedding')
  if codes is None:
    codes = named['vq.embedding'] + named['codebook.vq.offset']
  names['vq.embedding'] = codes
  name, kind = 'model.safetensors', 'llamagen' if cosine else 'taming'
  if layout == 'diffusers':
    name, kind = f'{DIFFUSERS}.safetensors', layout
    about = _diffusers_config(encoder, vq.codebook_size, tokenizer.image_size)
    (folder / 'config.json').write_text(json.dumps(about, indent=2) + '\n')
  if encoder.unit_range:
    logging.warning('these files do not tell that its images are in [0, 1]')
  tensors = layouts.write(names, 'var' if sides else kind)
  (folder / name).write_bytes(safetensors.numpy.save(tensors))


def _diffusers_config(encoder, codebook_size, image_size):
  """The config.json of diffusers' `VQModel`."""
  levels = range(1, len(encoder.ch_mult) + 1)
  kinds = ['Attn' * (i in (encoder.attn_levels or ())) for i in levels]
  return {
    '_class_name': 'VQModel',
    'in_channels': 3,
    'out_channels': 3,
    'down_block_types': [f'{kind}DownEncoderBlock2D' for kind in kinds],
    'up_block_types': [f'{kind}UpDecoderBlock2D' for kind in kinds[::-1]],
    'block_out_channels': encoder.channels(),
    'layers_per_block': encoder.num_res_blocks,
    'act_fn': 'silu',
    'latent_channels': encoder.z_channels,
    'sample_size': image_size,
    'num_vq_embeddings': codebook_size,
    'norm_num_groups': 32,
    'vq_embed_dim': encoder.code_dim,
    'norm_type': 'spatial' if encoder.movq else 'group',
    'mid_block_add_attention': encoder.mid_attention,
  }
