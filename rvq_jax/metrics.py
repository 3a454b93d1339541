"""Image and code metrics, each with the definition that its name hides.

Images: `mse` is on the model's scale [-1, 1] and `mse_01` on [0, 1], a quarter
of it; both on the unrounded output. PSNR and SSIM are computed per image, after
clipping and rounding to uint8, as files would hold them, and then averaged.

Codes: from counts summed over the whole split, never a mean over batches.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np

SSIM_VARIANT = (
  'Wang et al. 2004: Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, '
  'population variance, RGB channels averaged, valid windows only, uint8'
)
_WINDOW, _SIGMA = 11, 1.5


def to_uint8(images: jax.Array) -> jax.Array:
  """Maps the model's scale to uint8: clipped to [-1, 1] and rounded."""
  scaled = (jnp.clip(images, -1, 1).astype(jnp.float32) + 1) * 127.5
  return jnp.round(scaled).astype(jnp.uint8)


def squared_error(x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean squared error of each image, on the scale of the input.

  Args:
    x: images [B, h, w, 3].
    y: images like x.

  Returns:
    [B], float32.
  """
  return jnp.mean((x - y).astype(jnp.float32) ** 2, axis=(1, 2, 3))


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of each image in dB, after rounding to uint8.

  10 log10(255^2 / MSE). Equal images have no finite PSNR; they get that of an
  error of one level in a single value of the image.

  Args:
    x: images [B, h, w, 3] in [-1, 1].
    y: images [B, h, w, 3] in [-1, 1].

  Returns:
    [B], float32.
  """
  x, y = (to_uint8(image).astype(jnp.float32) for image in (x, y))
  floor = 1.0 / math.prod(x.shape[1:])
  return 10 * jnp.log10(255.0**2 / jnp.maximum(squared_error(x, y), floor))


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
  """Structural similarity of each image; see `SSIM_VARIANT`.

  Args:
    x: images [B, h, w, 3] in [-1, 1], sides of at least 11 pixels.
    y: images [B, h, w, 3] in [-1, 1].

  Returns:
    [B], float32; NaN for images smaller than the window.
  """
  if min(x.shape[1:3]) < _WINDOW:
    return jnp.full(x.shape[0], jnp.nan, jnp.float32)
  x, y = (to_uint8(image).astype(jnp.float32) for image in (x, y))
  grid = np.arange(_WINDOW) - _WINDOW // 2
  window = np.exp(-0.5 * (grid / _SIGMA) ** 2)
  window = jnp.asarray(window / window.sum(), jnp.float32)

  def blur(image):
    for axis in (1, 2):
      size = image.shape[axis] - _WINDOW + 1
      image = sum(
        window[i] * jax.lax.slice_in_dim(image, i, i + size, axis=axis)
        for i in range(_WINDOW)
      )
      # Else XLA fuses the passes and computes the first 11 times.
      image = jax.lax.optimization_barrier(image)
    return image

  mean_x, mean_y = blur(x), blur(y)
  var_x = blur(x * x) - mean_x**2
  var_y = blur(y * y) - mean_y**2
  cov = blur(x * y) - mean_x * mean_y
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  index = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
  index /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
  return jnp.mean(index, axis=(1, 2, 3))


def diversity(counts: jax.Array) -> dict[str, jax.Array]:
  """usage and perplexity of counts [K], float32 scalars."""
  p = counts / jnp.maximum(jnp.sum(counts), 1.0)
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
  return {
    'usage': jnp.mean((counts > 0).astype(jnp.float32)),
    'perplexity': jnp.exp(entropy),
  }


def code_statistics(counts) -> dict[str, float]:
  """How evenly the codes are used, from counts over a whole split.

  Args:
    counts: how often each code was chosen, [K], or [L, K] for L codebooks.

  Returns:
    usage (share of codes chosen at least once), perplexity (exp of the entropy
    of the code frequencies, at most K; higher is more even), perplexity_ratio
    (perplexity / K) and entropy_bits (the entropy, bits per token). With L
    codebooks the entropy is the mean of theirs.
  """
  counts = np.asarray(counts, np.float64)
  p = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
  terms = p * np.log(np.where(p > 0, p, 1.0))
  entropy = float(-terms.sum(axis=-1).mean())
  return {
    'usage': float((counts > 0).mean()),
    'perplexity': math.exp(entropy),
    'perplexity_ratio': math.exp(entropy) / counts.shape[-1],
    'entropy_bits': entropy / math.log(2),
  }


def effective_dimension(total, outer, count) -> float:
  """How many dimensions vectors spread over: exp(-sum p_i log p_i).

  p are the eigenvalues of their covariance, divided by their sum (the effective
  rank of Roy and Vetterli 2007): D for a ball, 1 for a line or a point.

  Args:
    total: sum of the vectors [D].
    outer: sum of x x^T [D, D].
    count: number of vectors.
  """
  mean = np.asarray(total, np.float64) / count
  covariance = np.asarray(outer, np.float64) / count - np.outer(mean, mean)
  values = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
  p = values / max(values.sum(), 1e-300)
  return math.exp(-np.sum(p * np.log(np.where(p > 0, p, 1.0))))


def bit_rates(
  tokens: int, pixels: int, codebook_size: int, entropy_bits: float
) -> dict[str, float]:
  """Bits that the tokens of an image cost.

  Args:
    tokens: tokens per image.
    pixels: pixels per image.
    codebook_size: K.
    entropy_bits: bits per token at the codes' frequencies.

  Returns:
    bits_per_image and bits_per_pixel with log2 K bits per token (fixed length),
    and entropy_bits_per_pixel with an ideal entropy code.
  """
  fixed = tokens * math.log2(codebook_size)
  return {
    'bits_per_image': fixed,
    'bits_per_pixel': fixed / pixels,
    'entropy_bits_per_pixel': tokens * entropy_bits / pixels,
  }


RECENT_TOKENS = 65_536
"""Tokens that LlamaGen's training log remembers (`codebook_used`)."""


class CodeDefinitions:
  """Usage and perplexity under each published definition.

  `add` takes the counts of each batch, in the order of the split.
  """

  def __init__(self):
    self._total, self._tokens, self._recent_tokens = 0.0, 0, 0
    self._batches = []  # (usage, perplexity) of each
    self._recent = collections.deque()  # counts of the last batches

  def add(self, counts) -> None:
    """Adds a batch.

    Args:
      counts: how often each code was chosen in it, [K], or [L, K] for L
        codebooks; a batch without tokens is left out.
    """
    counts = np.asarray(counts, np.float64)
    tokens = _tokens(counts)
    if not tokens:
      return
    self._total, self._tokens = self._total + counts, self._tokens + tokens
    statistics = code_statistics(counts)
    self._batches.append((statistics['usage'], statistics['perplexity']))
    self._recent.append(counts)
    self._recent_tokens += tokens
    # Whole batches alone: the oldest goes once the others fill the window.
    while self._recent_tokens - _tokens(self._recent[0]) >= RECENT_TOKENS:
      self._recent_tokens -= _tokens(self._recent.popleft())

  def result(self) -> dict[str, dict]:
    """The numbers under each definition.

    Returns:
      {'whole_split', 'mean_over_batches', 'last_65536_tokens'}, each with
      usage, perplexity, tokens (counted, per codebook) and definition, a line.

    Raises:
      ValueError: no batch had a token.
    """
    if not self._batches:
      raise ValueError('expected at least one batch with tokens, got none')
    batches = len(self._batches)
    tokens, recent = self._tokens, self._recent_tokens
    unit = 'tokens' if self._total.ndim == 1 else 'tokens per codebook'
    whole = 'the whole split, ' if recent == tokens else ''
    usage, perplexity = np.mean(self._batches, axis=0).tolist()
    entries = {
      'whole_split': (
        code_statistics(self._total),
        tokens,
        f'counts summed over all {tokens:,} {unit}; ours, and that of '
        'SEED-Voken (usage) and 1d-tokenizer (usage, and log2 perplexity as '
        'entropy)',
      ),
      'mean_over_batches': (
        {'usage': usage, 'perplexity': perplexity},
        tokens / batches,
        f'mean over {batches:,} batches of the value in each, '
        f'{tokens / batches:,.1f} {unit} on average, which neither the codes '
        'used nor the perplexity can pass; as Sonnet (perplexity) and '
        'latent-diffusion (perplexity and cluster_usage) log it',
      ),
      'last_65536_tokens': (
        code_statistics(sum(self._recent)),
        recent,
        f'the last {RECENT_TOKENS:,} tokens in whole batches: {whole}'
        f'{recent:,} {unit}; as the training log of LlamaGen (usage, of each '
        'GPU)',
      ),
    }
    result = {}
    for name, (found, count, definition) in entries.items():
      result[name] = {n: found[n] for n in ('usage', 'perplexity')}
      result[name] |= {'tokens': count, 'definition': definition}
    return result


def _tokens(counts) -> int:
  """Tokens of each codebook: they all see the same positions."""
  return int(counts.sum(axis=-1).mean())


def format_definitions(definitions: dict[str, dict]) -> str:
  """`CodeDefinitions.result` as lines: name, usage, perplexity, meaning."""
  lines = [f'  {"usage and perplexity by":<23}{"usage":>9}{"perplexity":>12}']
  for name, entry in definitions.items():
    lines.append(
      f'  {name:<23}{entry["usage"]:>9.2%}{entry["perplexity"]:>12,.1f}  '
      f'{entry["definition"]}'
    )
  return '\n'.join(lines)


def reconstruction_grid(originals, reconstructions) -> np.ndarray:
  """Originals above reconstructions, uint8 [n, h, w, 3], as [2 h, n w, 3]."""
  rows = [np.concatenate(list(x), axis=1) for x in (originals, reconstructions)]
  return np.concatenate(rows, axis=0)
