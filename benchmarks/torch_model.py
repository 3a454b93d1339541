"""The model of configs/cifar10.py in PyTorch, for `train_step.py --peer`.

Layers, order and sizes are as in rvq_jax/models; only the framework differs.
`TiledQuantizer` is a quantizer as good as ours: tiled exact search, rotation in
closed form, EMA by index_add.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (64, 128, 256)
LEAK = 0.01


class Residual(nn.Module):
  """leaky(x + norm(conv(leaky(norm(conv(x))))))."""

  def __init__(self, channels):
    super().__init__()
    self.convs = nn.ModuleList(
      nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
    )
    self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
    nn.init.zeros_(self.norms[1].weight)

  def forward(self, x):
    """[B, C, H, W] to the same."""
    y = F.leaky_relu(self.norms[0](self.convs[0](x)), LEAK)
    return F.leaky_relu(x + self.norms[1](self.convs[1](y)), LEAK)


class Attention(nn.Module):
  """x + attention(layer_norm(x)) over all positions."""

  def __init__(self, channels, heads):
    super().__init__()
    self.heads = heads
    self.norm = nn.LayerNorm(channels)
    self.qkv = nn.Linear(channels, 3 * channels)
    self.out = nn.Linear(channels, channels)

  def forward(self, x):
    """[B, C, H, W] to the same."""
    b, c, h, w = x.shape
    y = self.norm(x.flatten(2).transpose(1, 2))
    qkv = self.qkv(y).view(b, h * w, 3, self.heads, c // self.heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(query, key, value)
    y = self.out(y.transpose(1, 2).reshape(b, h * w, c))
    return x + y.transpose(1, 2).reshape(b, c, h, w)


class Model(nn.Module):
  """Encoder, quantizer, decoder; f = 8, D = 256, six residual blocks."""

  def __init__(self, quantizer, *, blocks=6, heads=8, dim=256):
    super().__init__()
    stem, channels = [], 3
    for width in WIDTHS:
      stem += [
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(LEAK),
      ]
      channels = width
    body = [Residual(channels) for _ in range(blocks)]
    self.encoder = nn.Sequential(*stem, *body, nn.Conv2d(channels, dim, 1))
    self.quantizer = quantizer
    layers = [nn.Conv2d(dim, channels, 1), Attention(channels, heads)]
    layers += [Residual(channels) for _ in range(blocks)]
    for width in (*WIDTHS[-2::-1], 3):
      layers.append(nn.ConvTranspose2d(channels, width, 4, 2, padding=1))
      if width != 3:
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(LEAK)]
      channels = width
    self.decoder = nn.Sequential(*layers, nn.Tanh())

  def forward(self, images):
    """Reconstruction and quantizer's loss of images [B, 3, h, w]."""
    z = self.encoder(images)
    b, d, h, w = z.shape
    tokens = z.permute(0, 2, 3, 1).reshape(b, h * w, d)
    with torch.autocast(tokens.device.type, enabled=False):  # as ours searches
      quantized, _, loss = self.quantizer(tokens.float())
    quantized = quantized.reshape(b, h, w, d).permute(0, 3, 1, 2)
    return self.decoder(quantized), loss.sum()


class Rotate(torch.autograd.Function):
  """Forward q; backward |q|/|e| R^T g, R = I - s s^T/(1 + c) + 2 v u^T."""

  @staticmethod
  def forward(ctx, e, q):
    """Returns q."""
    ctx.save_for_backward(e, q)
    return q.clone()

  @staticmethod
  def backward(ctx, g):
    """The gradient of e."""
    e, q = ctx.saved_tensors
    e_norm = e.norm(dim=-1, keepdim=True)
    q_norm = q.norm(dim=-1, keepdim=True)
    u, v = e / e_norm, q / q_norm
    s, c = u + v, (u * v).sum(-1, keepdim=True)
    along = (s * g).sum(-1, keepdim=True) / (1 + c)
    turned = g - along * s + 2 * (v * g).sum(-1, keepdim=True) * u
    return q_norm / e_norm * turned, None


class TiledQuantizer(nn.Module):
  """Rotation trick and EMA codebook without an N x K array."""

  def __init__(self, size, dim, *, decay=0.99, rows=1024):
    super().__init__()
    self.decay, self.rows = decay, rows
    embedding = torch.randn(size, dim)
    self.register_buffer('embedding', embedding)
    self.register_buffer('cluster_size', torch.ones(size))
    self.register_buffer('embedding_sum', embedding.clone())

  def _search(self, e):
    half = 0.5 * self.embedding.square().sum(1)
    scores = (
      torch.addmm(-half, part, self.embedding.T) for part in e.split(self.rows)
    )
    return torch.cat([score.argmax(1) for score in scores])

  def forward(self, z):
    """Quantized, ids and loss of z [B, T, D]."""
    e = z.reshape(-1, z.shape[-1])
    with torch.no_grad():
      ids = self._search(e)
      q = self.embedding[ids]
      counts = torch.bincount(ids, minlength=len(self.cluster_size))
      self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
      self.embedding_sum.mul_(self.decay).index_add_(
        0, ids, e, alpha=1 - self.decay
      )
      total = self.cluster_size.sum()
      smoothed = (self.cluster_size + 1e-5) / (
        total + len(self.cluster_size) * 1e-5
      )
      torch.div(
        self.embedding_sum, (smoothed * total)[:, None], out=self.embedding
      )
    loss = 0.25 * F.mse_loss(e, q)
    return Rotate.apply(e, q).view_as(z), ids.view(z.shape[:-1]), loss
