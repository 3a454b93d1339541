"""vector-quantize-pytorch's quantizers, for benchmarks/matched.py."""

import math

import numpy as np

PREFIX = 'peer:'


class Peer:
  """A quantizer of vector-quantize-pytorch, by the name of its class.

  Arguments are the package's defaults but for those of `_arguments`. A further
  option `dead` is threshold_ema_dead_code as a share of the mean count N/K.
  """

  def __init__(self, cell, options, k, seed, batch, steps, learning_rate):
    import torch
    import vector_quantize_pytorch

    torch.manual_seed(seed)
    self.torch, self.name = torch, cell.removeprefix(PREFIX)
    if 'dead' in options:
      options['threshold_ema_dead_code'] = options.pop('dead') * batch / k
    arguments = _arguments(self.name, k) | options
    self.layer = getattr(vector_quantize_pytorch, self.name)(**arguments)
    self.bits, self.block = math.log2(k), batch
    self.on_mse = (
      self.name in ('FSQ', 'LFQ') or 'directional_reparam' in options
    )
    self.parameters = [p for p in self.layer.parameters() if p.requires_grad]
    self.trained_by = (
      'EMA'
      if not self.parameters
      else 'latent MSE, Adam'
      if self.on_mse
      else 'own loss, Adam'
    )
    self.steps, self.learning_rate = steps, learning_rate

  def train(self, z, batches):
    """One step per batch; Adam with the learning rate of a half cosine."""
    del z
    self.layer.train()
    if self.parameters:
      optimizer = self.torch.optim.Adam(self.parameters)
    for step, rows in enumerate(batches):
      x = self.torch.from_numpy(rows)[None]
      quantized, _, *loss = self.layer(x)
      if not self.parameters:
        continue
      loss = sum(part.sum() for part in loss)
      if self.on_mse:
        loss += self.torch.mean((quantized - x) ** 2)
      rate = 0.5 * (1 + math.cos(math.pi * step / self.steps))
      optimizer.param_groups[0]['lr'] = rate * self.learning_rate
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
    self.layer.eval()

  def forward(self, x):
    """Quantized vectors and ids of x, in evaluation."""
    parts = []
    with self.torch.no_grad():
      for start in range(0, len(x), self.block):
        rows = self.torch.from_numpy(x[start : start + self.block])[None]
        parts.append([out[0].numpy() for out in self.layer(rows)[:2]])
    quantized, ids = map(np.concatenate, zip(*parts, strict=True))
    return quantized, ids

  def decode(self, ids):
    """The vectors that ids stand for."""
    decode = (
      self.layer.get_output_from_indices
      if self.name == 'VectorQuantize'
      else self.layer.indices_to_codes
    )
    with self.torch.no_grad():
      return decode(self.torch.from_numpy(ids)[None])[0].numpy()

  def searches(self, x, ids):
    """(vectors, codes, ids) of each codebook search."""
    if self.name in ('FSQ', 'LFQ'):
      return []
    return [(x, self.layer.codebook.detach().numpy(), ids)]


def _arguments(name, k):
  """What a quantizer of K codes for 16 channels is made with."""
  if name == 'FSQ':
    from rvq_jax.quantize.fsq import fsq_levels

    return {'levels': list(fsq_levels(k)), 'dim': 16}
  arguments = {'dim': 16, 'codebook_size': k}
  if name == 'VectorQuantize':
    arguments |= {
      'decay': 0.99,
      'kmeans_init': True,
      'threshold_ema_dead_code': 2,
    }
  return arguments
