"""`GumbelQuantizer`, a baseline: draws codes instead of searching them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rvq_jax.metrics import diversity
from rvq_jax.quantize.base import Dense, Quantizer, QuantizerOutput, masked_mean
from rvq_jax.quantize.codebook import Axis, draw_codes
from rvq_jax.quantize.fields import MAX_INT32, field


class GumbelQuantizer(Quantizer):
  """Draws codes by Gumbel-softmax: DALL-E's discrete VAE.

  Ramesh et al. 2021 (arXiv:2102.12092) with the relaxation of Jang et al. 2017
  (arXiv:1611.01144). A linear layer gives each position K logits l. Training
  mixes all codes, y = softmax((l + g)/tau) with Gumbel noise g and quantized =
  y @ embedding, and ids name the largest weight of y; evaluation takes only the
  code of the largest logit. tau falls from temperature_start to
  temperature_end along half a cosine. The loss is kl_weight times the mean over
  positions of KL(softmax(l) || uniform) in nats.

  The logits are [N, K] float32; training holds several such arrays.

  Training needs the rng stream 'codebook'. The noise of a position depends on
  the key and its index in the global batch, not on the number of devices. The
  collection 'codebook' holds `step`, the training steps so far, int32; call
  with `train=True` and `mutable=['codebook']`. Evaluation and `init` write
  nothing.

  `metrics` holds usage and perplexity of the batch's ids, quantization_error
  (mean squared, per dimension, between the mixture and the code of its id;
  without noise in evaluation), kl (nats) and temperature (tau).

  Attributes:
    code_dim: D, dimensions of a code. If it differs from the input's channels,
      a linear projection leads out. None: the channels.
    temperature_start: tau of the first training step.
    temperature_end: tau from step temperature_steps on.
    temperature_steps: training steps from temperature_start to _end.
    kl_weight: weight of the KL divergence.
  """

  code_dim: int | None = field(None, 1, 2**20)
  temperature_start: float = field(1.0, 1e-30)
  temperature_end: float = field(1 / 16, 1e-30)
  temperature_steps: int = field(10000, 1, MAX_INT32)
  kl_weight: float = field(5e-4, 0)

  @nn.compact
  def __call__(
    self, z: jax.Array, *, train: bool = False, mask: jax.Array | None = None
  ) -> QuantizerOutput:
    """Quantizes z [..., C]; see `VectorQuantizer.__call__`."""
    e, mask = self.inputs(z, mask)
    dim = self.code_dim or z.shape[-1]
    logits = Dense(self.codebook_size, name='logits')(e)
    codes = self.param('embedding', draw_codes, (self.codebook_size, dim))
    step = self.variable('codebook', 'step', lambda: jnp.zeros((), jnp.int32))
    temperature = self._temperature(step.value)

    sampling = train and not self.is_initializing()
    scores = logits + self._noise(len(e)) if sampling else logits
    mixture = jax.nn.softmax(scores / temperature) @ codes
    ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    q = jnp.take(codes, ids, axis=0)
    if sampling:
      step.value = step.value + 1

    log_p = jax.nn.log_softmax(logits)
    kl = math.log(self.codebook_size) + jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    kl = masked_mean(kl, mask)
    loss = self.share(self.kl_weight * kl, mask)
    counts = self.count(ids, e, mask)
    metrics = diversity(counts) | {
      'quantization_error': masked_mean((mixture - q) ** 2, mask),
      'kl': kl,
      'temperature': temperature,
    }
    quantized = mixture if sampling else q
    ids = ids.reshape(z.shape[:-1])
    return self.finish(z, quantized, ids, loss, counts, metrics)

  def ids(self, z: jax.Array) -> jax.Array:
    """The ids [...] int32 of z [..., C], equal to evaluation's."""
    logits = self.bound('logits', self.rows(z))
    return jnp.argmax(logits, -1).astype(jnp.int32).reshape(z.shape[:-1])

  def codes(self) -> jax.Array:
    """The codes [K, D] of bound variables."""
    return self.get_variable('params', 'embedding')

  def _temperature(self, step):
    done = jnp.minimum(step.astype(jnp.float32) / self.temperature_steps, 1.0)
    fall = self.temperature_start - self.temperature_end
    return self.temperature_end + fall * 0.5 * (1 + jnp.cos(jnp.pi * done))

  def _noise(self, n):
    """Gumbel noise [n, K], a key for each index in the global batch."""
    if not self.has_rng('codebook'):
      raise ValueError(
        "GumbelQuantizer: expected the rng stream 'codebook' in training: call "
        "apply(..., rngs={'codebook': key})"
      )
    key = self.make_rng('codebook')
    indices = jnp.arange(n) + n * Axis(self.axis_name).rank
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    row = (self.codebook_size,)
    return jax.vmap(lambda key: jax.random.gumbel(key, row))(keys)
