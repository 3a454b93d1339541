"""A tokenizer of rvq_jax in PyTorch: needs only torch and safetensors.

    from tokenizer_torch import Tokenizer

    tokenizer = Tokenizer.from_pretrained('export')  # or the Hub's 'OWNER/NAME'
    ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] -> int64 [B, H, W]
    images = tokenizer.decode(ids)  # float32 [B, h, w, 3] in [-1, 1]

Apache-2.0, like rvq_jax, which exports it beside model.safetensors.
"""

import ctypes
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FILES = WEIGHTS, CONFIG = ['model.safetensors', 'config.json']
ACTIVATIONS = {'leaky_relu': F.leaky_relu, 'swish': F.silu}


class Tokenizer:
  """Images to token ids and back, in float32; `from_pretrained` opens one.

  `codebook_size`, `factor`, `codes_per_position`, `model_hash`: as in rvq_jax.
  On NVIDIA GPUs set torch.backends.cudnn.allow_tf32 = False: TF32 changes ids.
  """

  def __init__(self, config, arrays, model_hash):
    self.config, self.arrays, self.model_hash = config, arrays, model_hash
    self.codebook_size, self.factor = config['codebook_size'], config['factor']
    self.codes_per_position = config['codes_per_position']
    self._quantizer = QUANTIZERS[config['quantizer']](config, arrays)
    self._act = ACTIVATIONS[config['activation']]

  @classmethod
  def from_pretrained(cls, name):
    """Opens an exported folder, or OWNER/NAME@REVISION of the Hub."""
    try:
      return cls(*_read(name))
    except Exception as why:  # files and the Hub cause many types
      reason = ' '.join(f'{type(why).__name__}: {why}'.split())
      raise ValueError(
        f'{name}: expected an export of rvq_jax, a folder or on the Hub, got '
        f'{reason}; if another version wrote it, use its tokenizer_torch.py'
      ) from why

  def to(self, device):
    """Moves it to a device."""
    self.arrays.update({n: x.to(device) for n, x in self.arrays.items()})
    return self

  @torch.no_grad()
  def encode(self, images):
    """Token ids: int64 [B, h/factor, w/factor], [..., L] or multi-scale [B, T].

    images: [B, h, w, 3] or [B, 3, h, w], uint8 or float in [-1, 1]; `factor`
    divides h and w, so that neither is 3.
    """
    x = torch.as_tensor(images).to(self.arrays['encoder.out.bias'].device)
    shape, size, f = list(x.shape), self.config['image_size'], self.factor
    x = x.movedim(-1, 1) if x.ndim == 4 and shape[3] == 3 else x
    fits = x.ndim == 4 and x.shape[1] == 3 and 0 not in shape
    if not fits or any(n != size if size else n % f for n in x.shape[2:]):
      sides = size or f'multiples of {f}'
      raise ValueError(
        f'expected images [B, h, w, 3] or [B, 3, h, w] with sides {sides}, got '
        f'{shape}; resize, crop or pad them'
      )
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
    if not x.is_floating_point() or not x.abs().max() <= 1.001:
      got = f'{x.dtype} from {x.min().item():.4g} to {x.max().item():.4g}'
      raise ValueError(f'expected uint8 or float images in [-1, 1], got {got}')
    if torch.as_tensor(images).is_floating_point() and 0 <= x.min() < x.max():
      text = (
        'float images in [0, 1] are read on [-1, 1]; if 0 is black, pass 2x - 1'
      )
      warnings.warn(text, stacklevel=2)
    z = self._encoder(x.float()).movedim(1, -1)
    return self._quantizer.ids(_dense(self.arrays, 'vq.project_in', z))

  @torch.no_grad()
  def decode(self, ids, *, channels_first=False):
    """Images of ids: float32 [B, h, w, 3], or [B, 3, h, w], in [-1, 1].

    Residual and multi-scale tokenizers also take prefixes of codes or scales.
    Pixels are ((images + 1) * 127.5).round().clamp(0, 255).byte().
    """
    ids = torch.as_tensor(ids).to(self.arrays['encoder.out.bias'].device)
    axes, lengths = self.config['axes'], self.config['lengths']
    fits = ids.ndim == axes.count(',') + 1 and 0 not in ids.shape
    fits = fits and (not lengths or ids.shape[-1] in lengths)
    if not fits or ids.is_floating_point() or ids.dtype == torch.bool:
      axes += f' with {axes[-2]} in {lengths}' if lengths else ''
      got = f'{ids.dtype} {list(ids.shape)}'
      raise ValueError(f'expected integer ids {axes}, got {got}')
    ids, last = ids.long(), self.codebook_size - 1
    if not 0 <= ids.min() <= ids.max() <= last:
      got = f'{ids.min()} to {ids.max()}; pass the model that made them'
      raise ValueError(f'expected ids from 0 to {last}, got {got}')
    z = _dense(self.arrays, 'vq.project_out', self._quantizer.codes(ids))
    images = self._decoder(z.movedim(-1, 1))
    return images if channels_first else images.movedim(1, -1)

  def _encoder(self, x):  # feature maps are [B, C, H, W]
    for i, stride in enumerate(self.config['strides']):
      x = _conv(self.arrays, f'encoder.conv{i}', x, stride)
      x = self._act(self._norm(f'encoder.norm{i}', x))
    return _conv(self.arrays, 'encoder.out', self._blocks('encoder', x))

  def _decoder(self, x):
    x = _conv(self.arrays, 'decoder.in', x)
    x = self._blocks('decoder', self._attention('decoder.attention', x))
    for i, stride in reversed([*enumerate(self.config['strides'])]):
      if stride == 2:
        x = F.conv_transpose2d(x, *self._get(f'decoder.up{i}'), 2, padding=1)
      else:
        x = _conv(self.arrays, f'decoder.up{i}', x)
      x = self._act(self._norm(f'decoder.norm{i}', x)) if i else x.tanh()
    return x

  def _get(self, name, parts='kernel bias'):
    return [self.arrays[f'{name}.{part}'] for part in parts.split()]

  def _norm(self, name, x):
    if f'{name}.bn.mean' in self.arrays:  # the stored statistics
      return F.batch_norm(x, *self._get(f'{name}.bn', 'mean var scale bias'))
    if f'{name}.gn.scale' not in self.arrays:
      return x
    groups = self.config['groups'][str(x.shape[1])]
    return F.group_norm(x, groups, *self._get(f'{name}.gn', 'scale bias'), 1e-6)

  def _blocks(self, part, x):
    for i in range(self.config['num_res_blocks']):
      y, name = x, f'{part}.block{i}'
      for j in range(2):
        y = _conv(self.arrays, f'{name}.conv{j}', self._act(y) if j else y)
        y = self._norm(f'{name}.norm{j}', y)
      x = self._act(x + y)
    return x

  def _attention(self, name, x):  # over all t positions, in h heads of d
    y = x.flatten(2).transpose(1, 2)
    norm = self._get(f'{name}.norm', 'scale bias')
    y = F.layer_norm(y, y.shape[2:], *norm, 1e-6)
    qkv = (self._get(f'{name}.{part}') for part in ('query', 'key', 'value'))
    qkv = (torch.einsum('btc,chd->bhtd', y, k) + b[:, None] for k, b in qkv)
    kernel, bias = self._get(f'{name}.out')
    y = F.scaled_dot_product_attention(*qkv)
    y = torch.einsum('bhtd,hdc->bct', y, kernel) + bias[:, None]
    return x + y.view(x.shape)


class _VQ:  # `ids` of vectors [..., D], here by the nearest code; and back
  def __init__(self, config, arrays, name='vq'):
    self.config, self.arrays, self.name = config, arrays, name

  def parts(self, kind):  # one per code of a position
    names = [f'vq.{kind}_{i}' for i in range(self.config['codes_per_position'])]
    return [_VQ(self.config, self.arrays, name) for name in names]

  def codebook(self):
    codes = self.arrays[f'{self.name}.embedding']
    if f'{self.name}.offset' in self.arrays:  # learned by gradient
      codes = codes + self.arrays[f'{self.name}.offset']
      codes = F.normalize(codes, dim=-1) if self.config['cosine'] else codes
    return _dense(self.arrays, 'vq.map', codes)  # if it is SimVQ

  def ids(self, e):
    if 'vq.logits.kernel' in self.arrays:  # of Gumbel-softmax
      return _dense(self.arrays, 'vq.logits', e).argmax(-1)
    e = F.normalize(e, dim=-1) if self.config['cosine'] else e
    return nearest(e, self.codebook(), self.config.get('inner_product'))

  def codes(self, ids):
    return self.codebook()[ids]


class _Residual(_VQ):  # each code quantizes the residual of the previous ones
  def ids(self, e):
    total, ids = torch.zeros_like(e), []
    for level in self.parts('level'):
      ids.append(level.ids(e - total))
      total = total + level.codes(ids[-1])
    return torch.stack(ids, -1)

  def codes(self, ids):
    return sum(map(_VQ.codes, self.parts('level'), ids.unbind(-1)))


class _Product(_VQ):  # each code quantizes one piece of a vector
  def ids(self, e):
    pieces = e.chunk(self.config['heads'], -1)
    return torch.stack([*map(_VQ.ids, self.parts('head'), pieces)], -1)

  def codes(self, ids):
    codes = map(_VQ.codes, self.parts('head'), ids.unbind(-1))
    return torch.cat([*codes], -1)


class _Multiscale(_VQ):  # the codes of grids [B, n, n] of growing side
  def ids(self, e):
    total, ids = torch.zeros_like(e), []
    for scale, side in enumerate(self.config['sides']):
      rest = self.pool(e - total, side)
      ids.append(super().ids(rest).flatten(1))
      total = total + self.addend(ids[-1], scale)
    return torch.cat(ids, 1)

  def pool(self, x, side):
    if self.config.get('resize') == 'torch':
      return F.adaptive_avg_pool2d(x.movedim(-1, 1), side).movedim(1, -1)
    parts = torch.eye(len(x[0])).repeat_interleave(side, 0).to(x)
    weights = parts.unflatten(0, (side, -1)).mean(1)  # of positions in areas
    return torch.einsum('nh,mw,bhwd->bnmd', weights, weights, x)

  def addend(self, ids, scale):  # to the whole grid
    sides = self.config['sides']
    x = super().codes(ids).unflatten(1, (sides[scale],) * 2).movedim(-1, 1)
    keys = self.config.get('resize') != 'torch'  # for antialias means Keys'
    x = F.interpolate(x, sides[-1:] * 2, mode='bicubic', antialias=keys)
    phis = self.config.get('phis')  # of the scales; older exports have none
    phi = phis[scale] if phis else scale * min(4, len(sides)) // len(sides)
    y = _conv(self.arrays, f'vq.phi_{phi}', x)
    return ((x + y) / 2).movedim(1, -1)

  def codes(self, ids):
    parts = enumerate(ids.tensor_split(self.config['lengths'][:-1], 1))
    return sum(self.addend(x, scale) for scale, x in parts if x.numel())


class _FSQ(_VQ):  # rounded dimensions; their levels are the digits of an id
  def ids(self, e):
    levels, weights = torch.tensor(self.config['radix'], device=e.device)
    half = (levels - 1) * (1 - 1e-3) / 2
    digits = torch.round(torch.tanh(e + torch.tan(0.5 / half)) * half - 0.5)
    return ((digits.long() + levels // 2) * weights).sum(-1)

  def codes(self, ids):
    levels, weights = torch.tensor(self.config['radix']).to(ids)
    return (ids[..., None] // weights % levels) / (levels // 2) - 1.0


QUANTIZERS = {'vq': _VQ, 'simvq': _VQ, 'gumbel': _VQ, 'residual': _Residual}
QUANTIZERS |= {'product': _Product, 'multiscale': _Multiscale, 'fsq': _FSQ}


def _conv(arrays, name, x, stride=1):  # padded as in JAX, an odd pixel last
  kernel = arrays[f'{name}.kernel']
  total = kernel.shape[-1] - stride
  x = F.pad(x, (total // 2, total - total // 2) * 2)
  return F.conv2d(x, kernel, arrays.get(f'{name}.bias'), stride)


def _dense(arrays, name, x):  # x if the model has no such layer
  kernel = arrays.get(f'{name}.kernel')
  return x if kernel is None else x @ kernel + arrays.get(f'{name}.bias', 0)


def nearest(e, codes, inner=False):
  """Ids of the codes [K, D] nearest to e [..., D]; the lowest in a tie.

  inner: by the largest inner product instead.
  """
  center = codes.mean(0)  # scores cancel if the codes lie far from 0
  center = torch.zeros_like(center) if inner else center
  codes, rows = codes - center, e.reshape(-1, e.shape[-1]) - center
  half = 0 if inner else codes.square().sum(1) / 2
  parts = rows.split(max(1, 2**24 // len(codes)))  # 64 MiB of scores each
  ids = [(part @ codes.T - half).argmax(1) for part in parts]
  return torch.cat(ids).view(e.shape[:-1])


def _read(name):  # config, arrays and hash of an export
  folder = Path(name).expanduser()
  hub = re.fullmatch(r'(?:hf:)?([\w.-]+/[\w.-]+)(?:@(.+))?', str(name))
  if hub and not folder.is_dir():
    from huggingface_hub import snapshot_download as download

    folder = Path(download(hub[1], revision=hub[2], allow_patterns=FILES))
  about = json.loads((folder / CONFIG).read_text())
  if about['format_version'] != 1:
    raise ValueError(f'format_version {about["format_version"]}')
  header, arrays = about['torch']['architecture'], {}
  digest = hashlib.sha256(header.encode())
  for name, x in sorted(load_file(folder / WEIGHTS).items()):
    x = x.float() if x.dtype == torch.float16 else x
    digest.update(f'{name} {str(x.dtype)[6:]} {tuple(x.shape)}'.encode())
    digest.update(ctypes.string_at(x.data_ptr(), x.nbytes))
    if x.ndim == 4:  # [k, k, C, F]; k is 4 in transposed convolutions
      x = (x.flip(0, 1).mT if len(x) == 4 else x).permute(3, 2, 0, 1)
    arrays[name.partition('.')[2]] = x.contiguous()
  if digest.hexdigest() != about['model_hash']:
    raise ValueError(f'{WEIGHTS} with another hash than in {CONFIG}')
  return json.loads(header) | about['torch'], arrays, about['model_hash']
