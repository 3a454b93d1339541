"""Names of weights in other people's files, for the network of `models.vqgan`.

A layout is a list of replacements that turns our names into theirs. It serves
both ways: reading looks up our names, writing renames them.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def _rules(text):
  """Pairs of a pattern and its replacement."""
  words = text.split()
  return (*zip(words[::2], words[1::2], strict=True),)


_COMMON = _rules(r"""encoder.quant_conv quant_conv
decoder.post_quant_conv post_quant_conv  _norm .norm  (\.norm\w*)\.norm\. \1.
vq\.embedding quantize.embedding.weight  vq\.phi_ quantize.quant_resi.qresi_ls.
\b(kernel|scale)$ weight""")
_MOVQ = _rules(r"""\.norm\.(scale|bias)$ .norm_layer.\1
\.scale\.(?=kernel|bias) .conv_y.  \.shift\. .conv_b.""")
_BLOCKS = _rules(r"""_attn .attn.  shortcut nin_shortcut  _down .downsample.conv
_up .upsample.conv  \.out\. .proj_out.""")
_TAMING = (
  _rules(r"""encoder.level encoder.down.  decoder.level decoder.up.
mid_block mid.block_  mid_attn mid.attn_1  _block(?=\d) .block.""")
  + _BLOCKS
)
_LLAMAGEN = (
  _rules(r"""mid_block1 mid.0  mid_attn mid.1  mid_block2 mid.2
level conv_blocks.  _block(?=\d) .res.""")
  + _BLOCKS
)
_DIFFUSERS = _rules(r"""mid_block1 mid.resnets.0  mid_attn mid.attentions.0
mid_block2 mid.resnets.1  coder.mid coder.mid_block
encoder.level encoder.down_blocks.  decoder.level decoder.up_blocks.
_block(?=\d) .resnets.  _attn .attentions.  (\d)_down \1.downsamplers.0.conv
(\d)_up \1.upsamplers.0.conv  shortcut conv_shortcut  norm_out conv_norm_out
(attentions\.\d+)\.norm\.(?=norm_layer|conv) \1.spatial_norm.
(attentions\.\d+)\.norm \1.group_norm""")
_QKV = _rules('query q  key k  value v')
_TO_QKV = _rules(r'query to_q  key to_k  value to_v  \.out\. .to_out.0.')
LAYOUTS = {
  'taming': _TAMING + _QKV,  # LDM and IBQ, too
  'var': _TAMING + _rules('query|key|value qkv'),
  'janus': _TAMING + _QKV,  # as transformers has it
  'llamagen': _LLAMAGEN + _QKV,
  'diffusers': _DIFFUSERS + _TO_QKV,
  'diffusers_2022': _DIFFUSERS + _rules(r'\.out\. .proj_attn.'),
}
"""Layout -> the replacements (pattern, text), in their order."""
_BY_EXECUTION = 'janus', 'llamagen', 'diffusers', 'diffusers_2022'
_ROOTS = 'encoder.', 'decoder.', 'quantize.', 'quant_conv.', 'post_quant_conv.'
_UNUSED = re.compile(
  r'quantize\.(ema_vocab_hit_SV|codebook_used|embedding\.(?!w))'
)
_EMBEDDING = 'quantize.embedding.weight'
_OTHERS = (
  ('diffusion_model.', 'a diffusion model without its first stage'),
  ('time_embedding.', 'a diffusion model'),
  ('quantize.proj.', 'a VQGAN with Gumbel codes'),
  ('latent_tokens', 'TiTok, whose tokens have one dimension'),
  ('encoder.conv_in.', 'an autoencoder without a table of codes (KL or LFQ)'),
  ('blocks.', 'a transformer, or a ViT tokenizer'),
)


def their_name(layout: str, name: str, levels: int, movq: bool = False) -> str:
  """A layout's name for our parameter, such as 'encoder.conv_in.kernel'."""
  if name.startswith('decoder.') and layout in _BY_EXECUTION:
    turned = lambda match: f'level{levels - 1 - int(match[1])}'  # noqa: E731
    name = re.sub(r'level(\d+)', turned, name)
  spatial = _MOVQ if movq and name.startswith('decoder.') else ()
  for pattern, text in (*spatial, *_COMMON, *LAYOUTS[layout]):
    name = re.sub(pattern, text, name)
  return name


def find_network(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], str]:
  """Finds a network of this family in a file; returns its tensors and layout.

  It removes prefixes of names, such as 'state_dict.first_stage_model.', and
  drops losses, discriminators and other networks. It prefers averages ('ema',
  'model_ema') that hold every tensor: their authors evaluate them.

  Raises:
    ValueError: there is none; says what the file seems to hold.
  """
  mark, found = 'encoder.conv_in.weight', {}
  for name, x in tensors.items():
    if name.endswith(mark) and x.ndim == 4:
      found[name.removesuffix(mark)] = x.shape[1]
  for start in sorted(found, key=lambda s: (not s.endswith('ema.'), len(s))):
    names = [
      n for n in tensors if n.startswith(tuple(start + p for p in _ROOTS))
    ]
    network = {n.removeprefix(start): tensors[n] for n in names}
    network = {n: x for n, x in network.items() if not _UNUSED.match(n)}
    averages = {n: f'{start}model_ema.{n.replace(".", "")}' for n in network}
    if tensors.keys() >= set(averages.values()):
      network = {n: tensors[average] for n, average in averages.items()}
    layout = _layout_of(network)
    if (
      found[start] == 3 and layout and np.ndim(network.get(_EMBEDDING, 0)) == 2
    ):
      return network, layout
  seems = f'tensors such as {min(tensors, default="none")!r}'
  for mark, kind in reversed(_OTHERS):
    if any(mark in name for name in tensors):
      seems = kind
  if found and 3 not in found.values():
    seems = f'a network for images with {max(found.values())} channels'
  raise ValueError(
    'expected the weights of a VQGAN (taming, LDM, LlamaGen, VAR, IBQ, Janus '
    f'or diffusers VQModel), got {seems}'
  )


def _layout_of(network) -> str | None:
  """The layout with the tensors' names."""

  def has(layout, name):
    return their_name(layout, name, 1) in network

  fitting = [x for x in LAYOUTS if has(x, 'encoder.level0_block0.conv1.kernel')]
  places = 'mid_attn', *(f'level{i}_attn0' for i in range(7))

  def attends(layout, place):
    names = (f'encoder.{place}.{part}.kernel' for part in ('query', 'out'))
    return all(has(layout, name) for name in names)

  fitting.sort(key=lambda x: not any(attends(x, place) for place in places))
  if (
    fitting[:1] == ['taming'] and 'decoder.up.0.upsample.conv.weight' in network
  ):
    return 'janus'
  return fitting[0] if fitting else None


def network_fields(
  network: Mapping[str, np.ndarray], layout: str
) -> dict[str, Any]:
  """The fields of `VQGANEncoder` and the codes, from the tensors' shapes."""

  def shape(name):
    x = network.get(their_name(layout, f'{name}.kernel', 1))
    return None if x is None else x.shape

  def count(name):
    return next(i for i in range(99) if not shape(name.format(i)))

  levels, ch = (
    count('encoder.level{}_block0.conv1'),
    shape('encoder.conv_in')[0],
  )
  widths = [shape(f'encoder.level{i}_block0.conv1')[0] for i in range(levels)]
  if any(width % ch for width in widths):
    raise ValueError(
      f'expected widths that are multiples of {ch}, got {widths}'
    )
  attention = [shape(f'encoder.level{i}_attn0.out') for i in range(levels)]
  spatial = their_name(layout, 'decoder.norm_out.norm.scale', 1, movq=True)
  size, dim = network[_EMBEDDING].shape
  return {
    'ch': ch,
    'ch_mult': [width // ch for width in widths],
    'factor': 2 ** (levels - 1),
    'num_res_blocks': count('encoder.level0_block{}.conv1'),
    'attn_levels': [i for i, x in enumerate(attention, 1) if x] or None,
    'mid_attention': bool(shape('encoder.mid_attn.out')),
    'z_channels': (shape('encoder.conv_out') or (1,))[0],
    'quant_kernel': (shape('encoder.quant_conv') or (1,))[-1],
    'movq': spatial in network,
    'codebook_size': size,
    'code_dim': dim,
  }


def read(
  network, shapes: Mapping[str, tuple], layout: str
) -> dict[str, np.ndarray]:
  """Converts the tensors of a network to arrays of our parameters.

  Args:
    network: from `find_network`.
    shapes: our names -> shapes.

  Raises:
    ValueError: a tensor is missing, superfluous or has another shape.
  """
  arrays, used = {}, {}
  for name, theirs, part in _pairs(shapes, layout):
    used[theirs] = True
    if theirs not in network:
      raise ValueError(f'expected a tensor {theirs}, got none')
    x, shape = network[theirs], shapes[name]
    x = x if part is None else np.split(x, 3)[part]
    if x.size == np.prod(shape):
      if len(shape) == 3:  # attention: a matrix, or a 1x1 convolution
        x = x.reshape(len(x), -1).T.reshape(shape)
      x = x.transpose(2, 3, 1, 0) if len(shape) == 4 else x.reshape(shape)
    if x.shape != shape:
      raise ValueError(
        f'{theirs}: the shape {network[theirs].shape} does not fit'
      )
    arrays[name] = np.ascontiguousarray(x, np.float32)
  if foreign := sorted(network.keys() - used):
    raise ValueError(f'the network has no place for {", ".join(foreign[:4])}')
  return arrays


def write(
  arrays: Mapping[str, np.ndarray], layout: str
) -> dict[str, np.ndarray]:
  """Converts our parameters to tensors with the names of a layout."""
  tensors: dict[str, dict[Any, np.ndarray]] = {}
  for name, theirs, part in _pairs(arrays, layout):
    x = np.asarray(arrays[name])
    if x.ndim == 4:
      x = x.transpose(3, 2, 0, 1)
    elif x.ndim == 3:
      x = x.reshape(-1, x.shape[-1]).T
      x = x if 'diffusers' in layout else x[:, :, None, None]
    elif name.endswith('.bias'):
      x = x.reshape(-1)
    tensors.setdefault(theirs, {})[part] = x
  return {
    name: np.ascontiguousarray(np.concatenate([x[i] for i in sorted(x)]))
    for name, x in tensors.items()
  }


def _pairs(names, layout):
  """Yields our name, theirs, and its third of theirs (query, key, value)."""
  blocks = (re.match(r'encoder\.level(\d+)', name) for name in names)
  levels = 1 + max(int(match[1]) for match in blocks if match)
  movq = 'decoder.norm_out.shift.kernel' in names
  parts = 'query', 'key', 'value'
  for name in names:
    theirs = their_name(layout, name, levels, movq)
    fused = '.qkv.' in theirs
    yield name, theirs, parts.index(name.split('.')[-2]) if fused else None
