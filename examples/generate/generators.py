"""A transformer that generates ids by masks or scale by scale."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from rvq_jax import Tokenizer
from rvq_jax.quantize.scales import pool


class Transformer(nn.Module):
  """Logits of the ids at all positions; pre-norm blocks without dropout.

  With `sides`, a token sees the tokens of its own scale and of coarser ones;
  without, it sees all tokens. Labels are below num_classes.
  """

  codebook_size: int
  num_tokens: int
  num_classes: int = 0
  sides: tuple[int, ...] = ()
  width: int = 128
  depth: int = 6

  @nn.compact
  def __call__(self, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits [B, t, K], float32, t at most T.

    Args:
      inputs: ids [B, t], int, K at masked positions; or vectors [B, t, C].
      labels: int [B]; -1 is no class.
    """
    init = nn.initializers.normal(0.02)
    embed = lambda count: nn.Embed(count, self.width, embedding_init=init)  # noqa: E731
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      x = embed(self.codebook_size + 1)(inputs)
    else:
      x = nn.Dense(self.width)(inputs)
    length, mask = x.shape[1], None
    heads = math.gcd(self.width, max(1, self.width // 64))
    positions = self.param('positions', init, (self.num_tokens, self.width))
    x += positions[None, :length]
    labels = jnp.where(labels < 0, self.num_classes, labels)
    x += embed(self.num_classes + 1)(labels)[:, None]
    if self.sides:
      scale = np.arange(len(self.sides)).repeat(np.square(self.sides))[:length]
      x += embed(len(self.sides))(scale)[None]
      mask = jnp.asarray(scale[:, None] >= scale)[None, None]
    for _ in range(self.depth):
      attention = nn.MultiHeadDotProductAttention(heads)
      x += attention(nn.LayerNorm()(x), mask=mask)
      y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
      x += nn.Dense(self.width)(nn.gelu(y))
    return nn.Dense(self.codebook_size, kernel_init=init)(nn.LayerNorm()(x))


def guided(model, params, inputs, labels, guidance: float) -> jax.Array:
  """Logits l_0 + guidance (l - l_0), l_0 without class (Ho, Salimans 2022)."""
  logits = model.apply(params, inputs, labels)
  if guidance == 1:
    return logits
  base = model.apply(params, inputs, jnp.full_like(labels, -1))
  return base + guidance * (logits - base)


@dataclasses.dataclass(frozen=True)
class Masked:
  """Masked generation of a grid (MaskGIT, Chang et al. 2022)."""

  model: Transformer

  def inputs(self, ids: jax.Array) -> jax.Array:
    """The model's inputs: ids, or K at masked positions."""
    return ids

  def nats(self, params, ids, labels, key) -> jax.Array:
    """The loss, an upper bound of -log p(ids) / T: nats per token [B].

    n tokens, n uniform in 1 ... T, are masked, at random positions M:

        nats = -1/n sum over i in M of log p(x_i | x_j, j not in M)

    Its mean over n and M equals the mean of -1/T sum over t of log p(x_s(t) |
    x_s(1) ... x_s(t-1)) over all orders s (Uria et al. 2014, section 4;
    Hoogeboom et al. 2022, section 2), and so is at least -log p(x) / T, where p
    draws an order and then token by token. n is spread evenly over the batch
    (Kingma et al. 2021, appendix I.1): the same mean with less noise.
    """
    (batch, length), (count_key, key) = ids.shape, jax.random.split(key)
    u = jax.random.uniform(count_key) + jnp.arange(batch) / batch
    count = 1 + jnp.int32(length * (u % 1))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, ids.shape)))
    masked = rank < count[:, None]
    inputs = jnp.where(masked, self.model.codebook_size, ids)
    each = cross_entropy(self.model.apply(params, inputs, labels), ids)
    return jnp.sum(each * masked, axis=1) / count

  def sample(self, guidance, steps, params, key, labels):
    """Draws ids [B, T], int32, in `steps` steps (MaskGIT, section 3.2).

    Each step draws all masked ids and keeps the most confident, so that
    T cos(pi/2 t / steps) are masked after step t. Confidence is log p of the id
    plus Gumbel noise, whose factor falls from 4.5 to 0.
    """
    length, mask_id = self.model.num_tokens, self.model.codebook_size

    def step(t, ids):
      id_key, noise_key = jax.random.split(jax.random.fold_in(key, t))
      logits = guided(self.model, params, ids, labels, guidance)
      masked, done = ids == mask_id, (t + 1) / steps
      drawn = jax.random.categorical(id_key, logits)
      noise = 4.5 * (1 - done) * jax.random.gumbel(noise_key, ids.shape)
      left = jnp.floor(length * jnp.cos(jnp.pi / 2 * done) + 1e-4)
      left = jnp.clip(left, 0, jnp.sum(masked, 1, keepdims=True) - 1)
      sure = jnp.where(masked, noise - cross_entropy(logits, drawn), jnp.inf)
      again = jnp.argsort(jnp.argsort(sure)) < left
      return jnp.where(again, mask_id, jnp.where(masked, drawn, ids))

    ids = jnp.full((len(labels), length), mask_id)
    return jax.lax.fori_loop(0, steps, step, ids)


@dataclasses.dataclass(frozen=True)
class NextScale:
  """Next-scale prediction (VAR, Tian et al. 2024) of grids over `unit`."""

  model: Transformer
  tokenizer: Tokenizer
  unit: float = 1.0

  def inputs(self, ids: jax.Array) -> jax.Array:
    """Inputs [B, t', C] of the model for the ids [B, t] of 0 or more scales.

    The first scale's inputs are 0. Each other scale's are means over areas of
    the grid of all coarser ids. The last one is the first scale without ids.
    """
    sides, tokenizer = self.model.sides, self.tokenizer
    channels = tokenizer.model.encoder.code_dim
    parts = [jnp.zeros((len(ids), sides[0] ** 2, channels))]
    for side, end in zip(sides[1:], tokenizer.prefixes, strict=False):
      if end <= ids.shape[1]:
        grid = tokenizer.grid(ids[:, :end])
        parts.append(pool(grid, jnp.ones(grid.shape[:3], bool), side)[0])
    return jnp.concatenate(parts, axis=1) / self.unit

  def nats(self, params, ids, labels, key=None) -> jax.Array:
    """The loss, exactly -log p(ids) / T: nats per token [B].

    p is the product over the scales (section 3.1) and their tokens of
    p(id | ids of the scales before it, label). The key is not used.
    """
    logits = self.model.apply(params, self.inputs(ids), labels)
    return cross_entropy(logits, ids).mean(axis=1)

  def sample(self, guidance, steps, params, key, labels):
    """Draws ids [B, T], int32, scale by scale; `steps` is not used."""
    ids = jnp.zeros((len(labels), 0), jnp.int32)
    for number, side in enumerate(self.model.sides):
      logits = guided(self.model, params, self.inputs(ids), labels, guidance)
      scale_key = jax.random.fold_in(key, number)
      drawn = jax.random.categorical(scale_key, logits[:, -(side**2) :])
      ids = jnp.concatenate([ids, drawn], axis=1)
    return ids
