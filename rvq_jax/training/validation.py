"""The evaluation step, and a whole split from its sums."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax import metrics
from rvq_jax.data.images import prepare_images
from rvq_jax.training import sharding

UNITS = {
  'mse': 'mean squared error on [-1, 1]',
  'mse_01': 'mean squared error on [0, 1]',
  'psnr': 'dB, mean over images, after rounding to uint8',
  'ssim': 'mean over images',
  'usage': 'share of the codes chosen at least once in the split',
  'perplexity': 'exp(entropy of the codes), higher is more even',
  'perplexity_ratio': 'perplexity / K',
  'entropy_bits': "bits per token at the codes' frequencies",
  'bits_per_image': 'tokens x log2 K',
  'bits_per_pixel': 'bits_per_image / pixels',
  'entropy_bits_per_pixel': 'tokens x entropy_bits / pixels',
  'quantization_error': 'mean squared distance to the code, per dimension',
  'images': 'images in the split that could be read',
  'tokens': 'tokens of these images',
}


def make_eval_step(model, *, axis_name=None):
  """Builds `eval_step(variables, batch) -> sums`.

  Args:
    model: a `VQVAE`.
    axis_name: mapped axis under `pmap` or `shard_map`, to sum over.

  Returns:
    A function of the model's variables and {'image': [B, h, w, 3] uint8 or
    float in [-1, 1], 'mask': bool [B]} that returns float32 sums over the
    images that count: images, tokens, mse, psnr, ssim, quantization_error, and
    counts [K].
  """

  def eval_step(variables, batch):
    images = prepare_images(batch['image'])
    mask = batch['mask']
    out = model.apply(variables, images, mask=mask)
    weight = mask.astype(jnp.float32)
    tokens = out.quantizer.ids[0].size * jnp.sum(weight)
    sums = {
      'images': jnp.sum(weight),
      'tokens': tokens,
      'quantization_error': tokens
      * out.quantizer.metrics['quantization_error'],
    }
    for name, measure in (
      ('mse', metrics.squared_error),
      ('psnr', metrics.psnr),
      ('ssim', metrics.ssim),
    ):
      values = measure(out.reconstruction, images)
      sums[name] = jnp.sum(jnp.where(mask, values, 0.0))
    if axis_name is not None:
      sums = jax.lax.psum(sums, axis_name)
    return sums | {'counts': out.quantizer.counts}

  return eval_step


def evaluate_split(
  eval_step,
  variables,
  batches: Iterable,
  *,
  mesh,
  on_batch: Callable[[dict, dict], None] | None = None,
) -> tuple[dict[str, float], np.ndarray]:
  """Metrics of a model over all batches of a split.

  Args:
    eval_step: from `make_eval_step`, jitted.
    variables: the model's collections.
    batches: {'image': [B, h, w, 3] uint8, 'mask': [B] bool} on the host; each
      process gives its share.
    mesh: the devices, from `data_mesh`.
    on_batch: called with each batch and what `eval_step` returned for it.

  Returns:
    The metrics named in `UNITS`, and the codes' counts [K], or [L, K] for L
    codebooks.

  Raises:
    ValueError: the split holds no image.
  """
  total, shape = None, None
  for batch in batches:
    shape = batch['image'].shape
    sums = jax.device_get(
      eval_step(variables, sharding.shard_batch(batch, mesh))
    )
    # float64 on the host: float32 stops counting at 2^24 tokens.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    if on_batch:
      on_batch(batch, sums)
  if total is None or not total['images']:
    raise ValueError('expected a split with at least one image, got none')
  images, tokens = total['images'], total['tokens']
  counts = total['counts']
  result = {
    name: float(total[name] / images) for name in ('mse', 'psnr', 'ssim')
  }
  result['mse_01'] = result['mse'] / 4
  result['quantization_error'] = float(total['quantization_error'] / tokens)
  result |= metrics.code_statistics(counts)
  result |= metrics.bit_rates(
    int(tokens / images),
    shape[1] * shape[2],
    counts.shape[-1],
    result['entropy_bits'],
  )
  result |= {'images': int(images), 'tokens': int(tokens)}
  return {name: result[name] for name in UNITS}, counts
