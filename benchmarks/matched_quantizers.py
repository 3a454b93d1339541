"""What benchmarks/matched.py compares: k-means, rvq_jax, and its peers.

Each has train(latents, batches), forward(x), decode(ids) and searches(x, ids),
all of NumPy arrays.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rvq_jax import nearest_codes
from rvq_jax.quantize.fsq import fsq_levels
from rvq_jax.quantize.registry import make_quantizer

PREFIX = 'peer:'


class Lloyd:
  """K-means over all rows from K of them; 0 iterations: those themselves."""

  trained_by = 'k-means'

  def __init__(self, k, seed, iterations):
    self.rng = np.random.default_rng(seed)
    self.k, self.iterations, self.bits = k, iterations, math.log2(k)

  def train(self, z, batches):
    """Runs the iterations; the error must never rise."""
    del batches
    z, last = z.astype(np.float32), math.inf
    self.codes = z[self.rng.choice(len(z), self.k, replace=False)]
    for _ in range(self.iterations):
      ids = np.asarray(nearest_codes(z, self.codes))
      error = np.sum((z - self.codes[ids]) ** 2, axis=1, dtype=np.float64)
      assert error.sum() <= last * (1 + 1e-6), (error.sum(), last)
      last = error.sum()
      counts = np.bincount(ids, minlength=self.k)
      sums = [np.bincount(ids, weights=x, minlength=self.k) for x in z.T]
      codes = np.stack(sums, axis=1) / np.maximum(counts, 1)[:, None]
      empty = np.flatnonzero(counts == 0)
      codes[empty] = z[
        self.rng.choice(len(z), len(empty), replace=False, p=error / last)
      ]
      self.codes = codes.astype(np.float32)

  def forward(self, x):
    """Quantized vectors and ids of x."""
    ids = np.asarray(nearest_codes(x, self.codes))
    return self.codes[ids], ids

  def decode(self, ids):
    """The vectors that ids stand for."""
    return self.codes[ids]

  def searches(self, x, ids):
    """(vectors, codes, ids) of each codebook search."""
    return [(x, self.codes, ids)]


class Ours:
  """A quantizer of rvq_jax."""

  def __init__(self, name, options, k, seed, batch, steps, learning_rate):
    del batch
    self.name, self.seed = name, seed
    self.codes = 2 if name in ('residual', 'product') else 1
    self.k = math.isqrt(k) if self.codes == 2 else k
    options |= {'residual': {'depth': 2}, 'product': {'heads': 2}}.get(name, {})
    self.layer = make_quantizer(name, codebook_size=self.k, **options)
    self.bits = self.codes * math.log2(self.k)
    self.on_mse = name == 'fsq'
    ema = getattr(self.layer, 'ema', False)
    self.trained_by = (
      'latent MSE, Adam' if self.on_mse else 'EMA' if ema else 'own loss, Adam'
    )
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    self.optimizer = optax.adam(schedule)

  def train(self, z, batches):
    """One step per batch."""
    key = jax.random.key(self.seed)
    variables = jax.jit(self.layer.init)(key, z[:2048])
    params = variables.pop('params', {})
    state = params, variables, self.optimizer.init(params)
    step = jax.jit(self._step, donate_argnums=0)
    for i, rows in enumerate(batches):
      state = step(state, rows, jax.random.fold_in(key, i))
    self.variables = jax.block_until_ready({'params': state[0], **state[1]})
    self.apply = jax.jit(self.layer.apply, static_argnames='method')

  def _step(self, state, z, key):
    params, rest, opt_state = state

    def loss(params):
      out, updates = self.layer.apply(
        {'params': params, **rest},
        z,
        train=True,
        mutable=['codebook'],
        rngs={'codebook': key},
      )
      mse = jnp.mean((out.quantized - z) ** 2) if self.on_mse else 0.0
      return out.loss + mse, updates

    grads, updates = jax.grad(loss, has_aux=True)(params)
    change, opt_state = self.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, change), {**rest, **updates}, opt_state

  def forward(self, x):
    """Quantized vectors and ids of x, in evaluation."""
    out = self.apply(self.variables, x)
    return np.asarray(out.quantized), np.asarray(out.ids)

  def decode(self, ids):
    """The vectors that ids stand for."""
    return np.asarray(self.apply(self.variables, ids, method='codes_from_ids'))

  def searches(self, x, ids):
    """(vectors, codes, ids) of each codebook search."""
    book = self.variables.get('codebook', {})
    if self.name == 'product':
      pieces = np.split(x, self.codes, axis=1)
      books = [book[f'head_{i}']['embedding'] for i in range(self.codes)]
      return [
        (*s, ids[:, i]) for i, s in enumerate(zip(pieces, books, strict=True))
      ]
    if self.name == 'residual':
      books = [np.asarray(book[f'level_{i}']['embedding']) for i in range(2)]
      left = x - books[0][ids[:, 0]]
      return [(x, books[0], ids[:, 0]), (left, books[1], ids[:, 1])]
    if self.name == 'fsq':
      return []
    return [(x, self.decode(np.arange(self.k)), ids)]


class Peer:
  """A quantizer of vector-quantize-pytorch, by the name of its class.

  Arguments are the package's defaults except in `_arguments`. A further
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
    directional = 'directional_reparam' in options
    self.on_mse = directional or self.name in ('FSQ', 'LFQ')
    self.parameters = [p for p in self.layer.parameters() if p.requires_grad]
    loss = 'latent MSE, Adam' if self.on_mse else 'own loss, Adam'
    self.trained_by = loss if self.parameters else 'EMA'
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
  """Arguments of a quantizer of K codes for 16 channels."""
  if name == 'FSQ':
    return {'levels': list(fsq_levels(k)), 'dim': 16}
  arguments = {'dim': 16, 'codebook_size': k}
  if name == 'VectorQuantize':
    arguments |= {'decay': 0.99, 'kmeans_init': True}
    arguments['threshold_ema_dead_code'] = 2
  return arguments
