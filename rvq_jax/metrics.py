"""Image and code metrics, each with its exact definition.

Images are uint8, or float on the model's scale [-1, 1]; other dtypes raise
ValueError. `mse` is on [-1, 1] and `mse_01` on [0, 1], a quarter of it; both
use the unrounded output. PSNR and SSIM are means over images, each clipped and
rounded to uint8 as in a file.

Code metrics use counts summed over the whole split, never a mean over batches.
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


def to_float(images: jax.Array) -> jax.Array:
  """Maps uint8 to the model's scale: x / 127.5 - 1, float32 in [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1


def prepare_images(images: jax.Array) -> jax.Array:
  """uint8 or float images on the model's scale, float32.

  ValueError for other dtypes. The caller guarantees the range of floats.
  """
  if images.dtype == jnp.uint8:
    return to_float(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'expected images as uint8 or float in [-1, 1], got {images.dtype}'
    )
  return images.astype(jnp.float32)


def to_uint8(images: jax.Array) -> jax.Array:
  """Maps the model's scale to uint8: clips to [-1, 1] and rounds."""
  scaled = (jnp.clip(images, -1, 1).astype(jnp.float32) + 1) * 127.5
  return jnp.round(scaled).astype(jnp.uint8)


def squared_error(x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean squared error of each image x and y [B, h, w, 3], on [-1, 1]: [B]."""
  return _mse(prepare_images(x), prepare_images(y))


def _mse(x, y):
  return jnp.mean((x - y) ** 2, axis=(1, 2, 3))


def _levels(images):
  """Images as whole numbers from 0 to 255, float32."""
  return to_uint8(prepare_images(images)).astype(jnp.float32)


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of each image in dB, after rounding to uint8.

  10 log10(255^2 / MSE) of x and y [B, h, w, 3]: [B], float32. Equal images have
  no finite PSNR; they get the PSNR for a difference of one level in one value.
  """
  x, y = _levels(x), _levels(y)
  floor = 1.0 / math.prod(x.shape[1:])
  return 10 * jnp.log10(255.0**2 / jnp.maximum(_mse(x, y), floor))


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
  """Structural similarity of each image; see `SSIM_VARIANT`.

  x and y [B, h, w, 3]: [B], float32. NaN for images smaller than the window.
  """
  if min(x.shape[1:3]) < _WINDOW:
    return jnp.full(x.shape[0], jnp.nan, jnp.float32)
  x, y = _levels(x), _levels(y)
  grid = np.arange(_WINDOW) - _WINDOW // 2
  weights = np.exp(-0.5 * (grid / _SIGMA) ** 2)
  window = jnp.asarray(weights / weights.sum(), jnp.float32)

  def blur(image):
    for axis in (1, 2):
      size = image.shape[axis] - _WINDOW + 1
      image = sum(
        window[i] * jax.lax.slice_in_dim(image, i, i + size, axis=axis)
        for i in range(_WINDOW)
      )
      # Without the barrier XLA fuses the passes and runs the first 11 times.
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
  """usage and perplexity of counts [K], float32 scalars; for use under jit."""
  return {
    'usage': jnp.mean((counts > 0).astype(jnp.float32)),
    'perplexity': jnp.exp(_entropy(_frequencies(counts))),
  }


def code_statistics(counts) -> dict[str, float]:
  """Statistics of code usage, from counts over a whole split.

  Args:
    counts: how often each code was chosen, [K], or [L, K] for L codebooks.

  Returns:
    usage (share of codes chosen at least once), perplexity (exp of the entropy
    of the code frequencies, at most K; higher is more even), perplexity_ratio
    (perplexity / K) and entropy_bits (bits per token; the mean over L).
  """
  counts = np.asarray(counts, np.float64)
  entropy = float(_entropy(_frequencies(counts)).mean())
  return {
    'usage': float((counts > 0).mean()),
    'perplexity': math.exp(entropy),
    'perplexity_ratio': math.exp(entropy) / counts.shape[-1],
    'entropy_bits': entropy / math.log(2),
  }


def _frequencies(counts):
  """counts [..., K] as shares that sum to 1; all 0 without counts."""
  return counts / counts.sum(axis=-1, keepdims=True).clip(1)


def _entropy(p):
  """-sum p log p over the last axis, in nats, with 0 log 0 = 0."""
  xp = jnp if isinstance(p, jax.Array) else np  # float64 on the host
  terms = xp.where(p > 0, p * xp.log(xp.where(p > 0, p, 1)), 0)
  return -xp.sum(terms, axis=-1)


def effective_dimension(total, outer, count) -> float:
  """The number of dimensions that vectors fill: exp(-sum p_i log p_i).

  p are the eigenvalues of the covariance divided by their sum (the effective
  rank of Roy and Vetterli 2007): D for a ball, 1 for a line or a point. `total`
  [D] is the sum of `count` vectors x, `outer` [D, D] the sum of x x^T.
  """
  values = _variances(total, outer, count)
  return math.exp(_entropy(values / max(values.sum(), 1e-300)))


def components_99(total, outer, count) -> int:
  """The number of principal components with 99 % of the variance of vectors.

  Arguments as in `effective_dimension`; 1 for a point.
  """
  values = np.sort(_variances(total, outer, count))[::-1]
  missing = values.sum() - np.cumsum(values)
  return int(np.argmax(missing <= 0.01 * values.sum())) + 1


def _variances(total, outer, count):
  """The eigenvalues of vectors' covariance, from their sums, float64."""
  mean = np.asarray(total, np.float64) / count
  covariance = np.asarray(outer, np.float64) / count - np.outer(mean, mean)
  return np.maximum(np.linalg.eigvalsh(covariance), 0.0)


def bit_rates(
  tokens: int, pixels: int, codebook_size: int, entropy_bits: float
) -> dict[str, float]:
  """Bits of an image's tokens.

  Returns:
    bits_per_image and bits_per_pixel with log2 K bits per token (fixed length),
    and entropy_bits_per_pixel with an ideal code of entropy_bits per token.
  """
  fixed = tokens * math.log2(codebook_size)
  return {
    'bits_per_image': fixed,
    'bits_per_pixel': fixed / pixels,
    'entropy_bits_per_pixel': tokens * entropy_bits / pixels,
  }


RECENT_TOKENS = 65_536  # the window of LlamaGen's log (`codebook_used`)


class CodeDefinitions:
  """Usage and perplexity under each published definition."""

  def __init__(self):
    self._total, self._tokens, self._recent_tokens = 0.0, 0, 0
    self._batches = []  # (usage, perplexity) of each
    self._recent = collections.deque()  # (tokens, counts) of the last ones

  def add(self, counts) -> None:
    """Adds the counts of the next batch, [K], or [L, K] for L codebooks."""
    counts = np.asarray(counts, np.float64)
    tokens = int(counts.sum(axis=-1).mean())  # all codebooks count the same
    if not tokens:
      return
    self._total, self._tokens = self._total + counts, self._tokens + tokens
    statistics = code_statistics(counts)
    self._batches.append((statistics['usage'], statistics['perplexity']))
    self._recent.append((tokens, counts))
    self._recent_tokens += tokens
    # Only whole batches: the oldest leaves once the others fill the window.
    while self._recent_tokens - self._recent[0][0] >= RECENT_TOKENS:
      self._recent_tokens -= self._recent.popleft()[0]

  def result(self) -> dict[str, dict]:
    """Usage, perplexity, tokens per codebook and definition, per definition.

    Returns:
      These under 'whole_split', 'mean_over_batches' and 'last_65536_tokens'.

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

    def entry(statistics, tokens, definition):
      shown = {name: statistics[name] for name in ('usage', 'perplexity')}
      return shown | {'tokens': tokens, 'definition': definition}

    return {
      'whole_split': entry(
        code_statistics(self._total),
        tokens,
        f'counts summed over all {tokens:,} {unit}; ours, SEED-Voken (usage) '
        'and 1d-tokenizer (usage, and log2 perplexity as entropy)',
      ),
      'mean_over_batches': entry(
        {'usage': usage, 'perplexity': perplexity},
        tokens / batches,
        f'mean over {batches:,} batches of {tokens / batches:,.1f} {unit} on '
        'average, which limits usage and perplexity; Sonnet (perplexity), '
        'latent-diffusion (perplexity and cluster_usage)',
      ),
      'last_65536_tokens': entry(
        code_statistics(sum(counts for _, counts in self._recent)),
        recent,
        f'the last {RECENT_TOKENS:,} tokens in whole batches: {whole}'
        f'{recent:,} {unit}; the training log of LlamaGen (usage per GPU)',
      ),
    }


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
