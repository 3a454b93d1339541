"""A tokenizer of rvq_jax in PyTorch: this file, torch and safetensors alone.

    from tokenizer_torch import Tokenizer

    tokenizer = Tokenizer.from_pretrained('export')  # or the Hub's 'OWNER/NAME'
    ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] -> int64 [B, H, W]
    images = tokenizer.decode(ids)  # float32 [B, h, w, 3] in [-1, 1]

Apache-2.0, as rvq_jax, whose launch/export.py puts it beside model.safetensors.
"""

import ctypes
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FILES = WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
QUANTIZERS = 'vq residual multiscale product fsq simvq gumbel'.split()
SIDES = 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 51, 64
ACTIVATIONS = {'leaky_relu': F.leaky_relu, 'swish': F.silu}
# With the arrays, these fields are what the model's hash is taken of.
HASHED = 'widths factor num_res_blocks num_heads code_dim quantizer '
HASHED += 'codebook_size activation cosine depth heads dtype'


class Tokenizer:
  """Images to token ids and back, in float32; `from_pretrained` opens one.

  `codebook_size`, `factor`, `codes_per_position` and `model_hash` are those of
  rvq_jax. On NVIDIA GPUs PyTorch computes convolutions in TF32, which changes
  some ids, unless `torch.backends.cudnn.allow_tf32 = False`.
  """

  def __init__(self, config, arrays, model_hash):
    self.c, self.w, self.model_hash = config, arrays, model_hash
    self.codebook_size, self.factor = config['codebook_size'], config['factor']
    several = {'residual': 'depth', 'product': 'heads'}
    self.codes_per_position = config.get(several.get(config['quantizer']))
    self._act, self.sides = ACTIVATIONS[config['activation']], config['sides']
    self._halvings = int(math.log2(self.factor))
    self._stages = range(max(len(config['widths']), self._halvings))

  @classmethod
  def from_pretrained(cls, name):
    """Opens a folder of launch/export.py, or OWNER/NAME@REVISION of the Hub."""
    return cls(*_read(_find(name)))

  def to(self, device):
    """Moves it to a device."""
    self.w = {name: x.to(device) for name, x in self.w.items()}
    return self

  @torch.no_grad()
  def encode(self, images):
    """Token ids, int64 [B, h/factor, w/factor], with several codes [..., L].

    Multi-scale ids are [B, T], the coarsest scale first.

    images: [B, h, w, 3] or [B, 3, h, w], uint8 or float in [-1, 1]; `factor`
    divides h and w, so that neither is 3.
    """
    x = self._tensor(images)
    shape = list(x.shape)
    x = x.movedim(-1, 1) if x.ndim == 4 and shape[3] == 3 else x
    fits = x.ndim == 4 and x.shape[1] == 3 and 0 not in shape
    if not fits or any(side % self.factor for side in x.shape[2:]):
      raise ValueError(
        'expected images [B, h, w, 3] or [B, 3, h, w] whose sides are '
        f'multiples of {self.factor}, got {shape}; crop or pad them'
      )
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
    if not x.is_floating_point() or not x.abs().max() <= 1.001:
      raise ValueError(
        f'expected images as uint8 or float in [-1, 1], got {x.dtype} from '
        f'{x.min().item():.4g} to {x.max().item():.4g}'
      )
    z = self._encoder(x.float()).movedim(1, -1)
    if self.sides and z.shape[1:3] != (self.sides[-1],) * 2:
      size = self.sides[-1] * self.factor
      raise ValueError(f'expected images of {size} x {size}, got {shape}')
    e = self._dense('vq.project_in', z)
    return getattr(self, f'_{self.c["quantizer"]}_ids')(e)

  @torch.no_grad()
  def decode(self, ids, *, channels_first=False):
    """Images of ids: float32 [B, h, w, 3], or [B, 3, h, w], in [-1, 1].

    Residual and multi-scale tokenizers take any first codes or scales. As
    pixels: ((images + 1) * 127.5).round().clamp(0, 255).byte().
    """
    ids, most = self._tensor(ids), self.codes_per_position
    least = 1 if self.c['quantizer'] == 'residual' else most
    fits = ids.ndim == 3 + bool(most) and 0 not in ids.shape
    fits = fits and (not most or least <= ids.shape[3] <= most)
    if self.sides:
      ends = [*itertools.accumulate(side**2 for side in self.sides)]
      fits = ids.ndim == 2 and len(ids) > 0 and ids.shape[1] in ends
    if not fits or ids.is_floating_point() or ids.dtype == torch.bool:
      form = f'[B, T], T of {ends}' if self.sides else '[B, H, W]'
      form = f'[B, H, W, {most}]' if most else form
      raise ValueError(
        f'expected ids {form}, integers, got {ids.dtype} {list(ids.shape)}'
      )
    ids, last = ids.long(), self.codebook_size - 1
    if not 0 <= ids.min() <= ids.max() <= last:
      raise ValueError(
        f'expected ids from 0 to {last}, got {ids.min()} to {ids.max()}; are '
        'they of another model?'
      )
    q = getattr(self, f'_{self.c["quantizer"]}_codes')(ids)
    images = self._decoder(self._dense('vq.project_out', q).movedim(-1, 1))
    return images if channels_first else images.movedim(1, -1)

  # The model. Feature maps x are [B, C, H, W].

  def _encoder(self, x):
    for i in self._stages:
      x = self._conv(f'encoder.conv{i}', x, 2 if i < self._halvings else 1)
      x = self._act(self._norm(f'encoder.norm{i}', x))
    return self._conv('encoder.out', self._blocks('encoder', x))

  def _decoder(self, x):
    x = self._attention('decoder.attention', self._conv('decoder.in', x))
    x = self._blocks('decoder', x)
    for i in reversed(self._stages):
      if i < self._halvings:
        x = F.conv_transpose2d(x, *self._get(f'decoder.up{i}'), 2, padding=1)
      else:
        x = self._conv(f'decoder.up{i}', x)
      x = self._act(self._norm(f'decoder.norm{i}', x)) if i else x.tanh()
    return x

  def _get(self, name, parts='kernel bias'):
    return [self.w.get(f'{name}.{part}') for part in parts.split()]

  def _tensor(self, x):
    return torch.as_tensor(x).to(self.w['encoder.out.bias'].device)

  def _conv(self, name, x, stride=1):
    kernel, bias = self._get(name)
    total = kernel.shape[-1] - stride  # JAX's 'SAME': an odd pixel at the end
    pads = (total // 2, total - total // 2) * 2
    return F.conv2d(F.pad(x, pads), kernel, bias, stride)

  def _norm(self, name, x):
    if f'{name}.bn.mean' in self.w:  # the stored statistics
      return F.batch_norm(x, *self._get(f'{name}.bn', 'mean var scale bias'))
    groups = 32 if x.shape[1] >= 128 else max(x.shape[1] // 4, 1)
    return F.group_norm(x, groups, *self._get(f'{name}.gn', 'scale bias'), 1e-6)

  def _blocks(self, part, x):
    for name in (f'{part}.block{i}' for i in range(self.c['num_res_blocks'])):
      y = self._norm(f'{name}.norm0', self._conv(f'{name}.conv0', x))
      y = self._norm(f'{name}.norm1', self._conv(f'{name}.conv1', self._act(y)))
      x = self._act(x + y)
    return x

  def _attention(self, name, x):  # over all t positions, in h heads of d
    y = x.flatten(2).transpose(1, 2)
    norm, qkv = self._get(f'{name}.norm', 'scale bias'), []
    y = F.layer_norm(y, y.shape[2:], *norm, 1e-6)
    for part in ('query', 'key', 'value'):
      kernel, bias = self._get(f'{name}.{part}')
      qkv.append(torch.einsum('btc,chd->bhtd', y, kernel) + bias[:, None])
    kernel, bias = self._get(f'{name}.out')
    y = F.scaled_dot_product_attention(*qkv)
    y = torch.einsum('bhtd,hdc->bct', y, kernel) + bias[:, None]
    return x + y.view(x.shape)

  def _dense(self, name, x):
    kernel, bias = self._get(name)  # None: the model has no such projection
    return x if kernel is None else x @ kernel + bias

  # Quantizers: _NAME_ids of vectors e [..., D], _NAME_codes of ids.

  def _codebook(self, part=''):
    codes, offset = self._get('vq' + part, 'embedding offset')
    if self.c['quantizer'] == 'simvq':
      return codes @ self.w['vq.map.kernel']
    if offset is not None:  # learned by gradient
      codes = codes + offset
      codes = F.normalize(codes, dim=-1) if self.c['cosine'] else codes
    return codes

  def _vq_ids(self, e, part=''):
    if self.c['cosine'] and self.c['quantizer'] != 'simvq':
      e = F.normalize(e, dim=-1)
    return nearest(e, self._codebook(part))

  def _vq_codes(self, ids, part=''):
    return self._codebook(part)[ids]

  def _gumbel_ids(self, e):
    return self._dense('vq.logits', e).argmax(-1)

  _simvq_ids, _simvq_codes, _gumbel_codes = _vq_ids, _vq_codes, _vq_codes

  def _residual_ids(self, e):
    total, ids = torch.zeros_like(e), []
    for part in (f'.level_{i}' for i in range(self.c['depth'])):
      ids.append(self._vq_ids(e - total, part))
      total = total + self._vq_codes(ids[-1], part)
    return torch.stack(ids, -1)

  def _residual_codes(self, ids):
    levels = enumerate(ids.unbind(-1))
    return sum(self._vq_codes(x, f'.level_{i}') for i, x in levels)

  def _multiscale_ids(self, e):
    total, ids = torch.zeros_like(e), []
    for i, side in enumerate(self.sides):
      rows = area(e.shape[1], side).to(e)
      rest = torch.einsum('nh,mw,bhwd->bnmd', rows, rows, e - total)
      ids.append(self._vq_ids(rest).flatten(1))
      total = total + self._scale(ids[-1], i)
    return torch.cat(ids, 1)

  def _scale(self, ids, i):  # what the ids of scale i add to the whole grid
    side, groups = self.sides[i], min(4, len(self.sides))
    x = self._vq_codes(ids).unflatten(1, (side, side)).movedim(-1, 1)
    size = (self.sides[-1],) * 2
    x = F.interpolate(x, size, mode='bicubic', antialias=True)
    y = self._conv(f'vq.phi_{i * groups // len(self.sides)}', x)
    return ((x + y) / 2).movedim(1, -1)

  def _multiscale_codes(self, ids):
    total = 0
    for i, side in enumerate(self.sides):
      if ids.shape[1]:  # else: a prefix of the scales
        total = total + self._scale(ids[:, : side**2], i)
        ids = ids[:, side**2 :]
    return total

  def _product_ids(self, e):
    pieces = enumerate(e.chunk(self.c['heads'], -1))
    return torch.stack([self._vq_ids(x, f'.head_{i}') for i, x in pieces], -1)

  def _product_codes(self, ids):
    pieces = enumerate(ids.unbind(-1))
    return torch.cat([self._vq_codes(x, f'.head_{i}') for i, x in pieces], -1)

  def _fsq_levels(self, device):
    bits = int(math.log2(self.codebook_size))
    fours = -bits % 3 if bits > 1 else 0
    levels = [8] * ((bits - 2 * fours) // 3) + [4] * fours or [2]
    weights = [math.prod(levels[:i]) for i in range(len(levels))]
    return torch.tensor([levels, weights], device=device)

  def _fsq_ids(self, e):
    levels, weights = self._fsq_levels(e.device)
    half = (levels - 1) * (1 - 1e-3) / 2
    digits = torch.round(torch.tanh(e + torch.tan(0.5 / half)) * half - 0.5)
    return ((digits.long() + levels // 2) * weights).sum(-1)

  def _fsq_codes(self, ids):
    levels, weights = self._fsq_levels(ids.device)
    return (ids[..., None] // weights % levels) / (levels // 2) - 1.0


def nearest(e, codes):
  """Ids of the codes [K, D] nearest to e [..., D]; the lowest of equals."""
  center = codes.mean(0)  # scores cancel where the codes lie far from 0
  codes, rows = codes - center, e.reshape(-1, e.shape[-1]) - center
  half = codes.square().sum(1) / 2
  parts = rows.split(max(1, 2**24 // len(codes)))  # 64 MiB of scores each
  ids = [(part @ codes.T - half).argmax(1) for part in parts]
  return torch.cat(ids).view(e.shape[:-1])


def area(grid, side):
  """Share of each of `grid` positions in each of `side` cells."""
  edges, left = torch.arange(side + 1.0) * grid / side, torch.arange(grid)
  end = torch.minimum(edges[1:, None], left + 1)
  overlap = end - torch.maximum(edges[:-1, None], left)
  return overlap.clamp(min=0) * side / grid


def _find(name):
  # The folder called `name`, or that of the Hub, downloaded.
  folder = Path(name).expanduser()
  hub = re.fullmatch(r'(?:hf:)?([\w.-]+/[\w.-]+)(?:@(.+))?', str(name))
  if folder.is_dir() or not hub:
    return folder
  try:
    from huggingface_hub import snapshot_download

    wanted = {'revision': hub[2], 'allow_patterns': [*FILES]}
    return Path(snapshot_download(hub[1], **wanted))
  except Exception as error:  # its own, and those of its HTTP library
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise FileNotFoundError(
      f'{name}: no such folder, and not to be had from the Hub: {reason}'
    ) from error


def _read(folder):
  # Config, arrays and hash of an export.
  try:
    about = json.loads((folder / CONFIG).read_text())
    c = {n.rpartition('.')[2]: v for n, v in about['config'].items()}
    hashed = {n: c[n] for n in HASHED.split()}
    sides, c['sides'] = c.get('sides'), None
    if c['quantizer'] == 'multiscale':
      grid = c['image_size'] // c['factor']
      default = [*(side for side in SIDES if side < grid), grid]
      hashed['sides'] = c['sides'] = sides or default
    header = json.dumps(hashed, sort_keys=True)
    names = str(c['quantizer']), str(c['activation'])
    version = f'format_version {about["format_version"]}'
    arrays, wanted = load_file(folder / WEIGHTS), about['model_hash']
  except Exception as why:  # of the many that such files can cause
    raise ValueError(
      f'{folder}: expected {WEIGHTS} and {CONFIG} as launch/export.py writes '
      f'them, got {type(why).__name__}: {why}'
    ) from why
  choices = QUANTIZERS, ACTIVATIONS, ['format_version 1']
  for value, known in zip((*names, version), choices, strict=True):
    if value not in known:
      raise ValueError(
        f'{folder}: expected one of {", ".join(known)}, got {value!r}; use '
        'rvq_jax.load, or a newer tokenizer_torch.py'
      )
  digest = hashlib.sha256(header.encode())
  for name, x in sorted(arrays.items()):
    dtype, shape = str(x.dtype).removeprefix('torch.'), tuple(x.shape)
    digest.update(f'{name} {dtype} {shape}'.encode())
    digest.update(ctypes.string_at(x.data_ptr(), x.nbytes))
    if x.ndim == 4 and len(x) == 4:  # of a transposed convolution [4, 4, C, F]
      arrays[name] = x.flip(0, 1).permute(2, 3, 0, 1).contiguous()
    elif x.ndim == 4:  # [k, k, C, F]
      arrays[name] = x.permute(3, 2, 0, 1).contiguous()
  if digest.hexdigest() != wanted:
    raise ValueError(
      f'{folder} is damaged: {WEIGHTS} has another hash than {CONFIG} says; '
      'export or download it again'
    )
  return c, {n.partition('.')[2]: x for n, x in arrays.items()}, wanted
