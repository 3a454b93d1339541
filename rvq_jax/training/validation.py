"""The evaluation step, and the metrics of a whole split from its sums."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax import metrics, sharding
from rvq_jax.data.images import prepare_images
from rvq_jax.quantize.codebook import count_codes, unit

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
  'relative_error': 'squared distance of latents to what replaces them / |z|^2',
  'latent_dimension': 'effective dimension of the latents',
  'code_dimension': 'effective dimension of what replaces them',
  'images': 'images in the split that could be read',
  'tokens': 'tokens of these images',
}
"""Metric -> its unit and meaning."""


PREFIX_UNITS = {
  'tokens': 'codes of an image that are decoded',
  **{n: UNITS[n] for n in ('bits_per_image', 'mse', 'psnr')},
  'quantization_error': UNITS['quantization_error'],
  'usage': 'of the last of these levels, as a share of the lesser of K and its '
  'tokens in the split',
  'perplexity': 'of the last of these levels',
}
"""Metric of a prefix of the codes -> its unit and meaning."""


def make_eval_step(model, *, prefixes: Sequence[int] = (), axis_name=None):
  """Builds `eval_step(variables, batch) -> sums` over the valid images.

  Args:
    model: a `VQVAE`.
    prefixes: lengths of the last axis of ids that are to be decoded too,
      ascending, the last one whole; see `Tokenizer.prefixes`.
    axis_name: mapped axis under `pmap` or `shard_map`, to sum over.

  Returns:
    A function of the model's variables and {'image': [B, h, w, 3] uint8 or
    float in [-1, 1], 'mask': bool [B]} that returns float32 sums: images,
    tokens, mse, psnr, ssim, quantization_error, latent_error (|z - q|^2 of the
    latents and what replaces them), 'latents' and 'codes' (`_moments`), counts
    [K], and of each prefix in 'prefixes': mse, psnr, quantization_error and the
    counts [K] of the codes that it adds.
  """

  cosine = getattr(model.vq, 'cosine', False)

  def eval_step(variables, batch):
    images, mask = prepare_images(batch['image']), batch['mask']
    out = model.apply(variables, images, mask=mask)
    z, q = (
      x.astype(jnp.float32) for x in (out.latents, out.quantizer.quantized)
    )
    z = unit(z) if cosine else z
    weight = mask.astype(jnp.float32)
    tokens = out.quantizer.ids[0].size * jnp.sum(weight)
    error = out.quantizer.metrics['quantization_error']
    sums = {
      'images': jnp.sum(weight),
      'tokens': tokens,
      'positions': z[0, ..., 0].size * jnp.sum(weight),
      'quantization_error': tokens * error,
      'latent_error': jnp.sum(jnp.where(mask, _squares(z - q), 0.0)),
      'latents': _moments(z, mask),
      'codes': _moments(q, mask),
    }
    sums |= _image_sums(out.reconstruction, images, mask)
    if prefixes:
      sums['prefixes'] = list(prefix_sums(variables, out, images, mask, tokens))
    if axis_name is not None:
      sums = jax.lax.psum(sums, axis_name)
    return sums | {'counts': out.quantizer.counts}

  def prefix_sums(variables, out, images, mask, tokens):
    ids, first = out.quantizer.ids, 0
    size = model.vq.codebook_size
    for level, end in enumerate(prefixes, 1):
      made = out.reconstruction
      if end < ids.shape[-1]:
        made = model.apply(variables, ids[..., :end], method='decode')
      added = ids[..., first:end]
      valid = jnp.broadcast_to(
        mask.reshape(-1, *[1] * (ids.ndim - 1)), added.shape
      )
      error = out.quantizer.metrics[f'quantization_error_{level}']
      sums = _image_sums(made, images, mask)
      yield {
        'mse': sums['mse'],
        'psnr': sums['psnr'],
        'quantization_error': tokens * error,
        'counts': count_codes(added.ravel(), size, weight=valid.ravel()),
      }
      first = end

  return eval_step


def _image_sums(made, images, mask):
  """Sums of the metrics of reconstructions over the valid images."""
  return {
    name: jnp.sum(jnp.where(mask, per_image(made, images), 0.0))
    for name, per_image in (
      ('mse', metrics.squared_error),
      ('psnr', metrics.psnr),
      ('ssim', metrics.ssim),
    )
  }


def _squares(x):
  """|x|^2 of each image [B] of latents [B, H, W, D]."""
  return jnp.sum(x**2, axis=(1, 2, 3))


def _moments(x, mask):
  """Sums over valid positions of x [B, H, W, D] and of x x^T [D, D]."""
  x = jnp.where(mask[:, None, None, None], x, 0.0).reshape(-1, x.shape[-1])
  return {'sum': jnp.sum(x, axis=0), 'outer': x.T @ x}


def make_autoencoder_step(model):
  """Builds `step(variables, batch) -> sums` of the model without quantization.

  The sums are images and mse, as of `make_eval_step`.
  """

  def step(variables, batch):
    images, mask = prepare_images(batch['image']), batch['mask']
    out = model.apply(variables, images, quantize=False)
    made = out.reconstruction
    error = jnp.where(mask, metrics.squared_error(made, images), 0.0)
    return {'images': jnp.sum(mask.astype(jnp.float32)), 'mse': jnp.sum(error)}

  return step


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
    The metrics named in `UNITS`, and of an eval_step with prefixes 'prefixes',
    those of `PREFIX_UNITS` of each; the codes' counts [K], or [L, K] for L
    codebooks.

  Raises:
    ValueError: the split holds no image.
  """
  total, shape = _total(eval_step, variables, batches, mesh, on_batch)
  images, tokens, counts = total['images'], total['tokens'], total['counts']
  result = {
    name: float(total[name] / images) for name in ('mse', 'psnr', 'ssim')
  }
  result['mse_01'] = result['mse'] / 4
  result['quantization_error'] = float(total['quantization_error'] / tokens)
  latents, codes = total['latents'], total['codes']
  result['relative_error'] = float(
    total['latent_error'] / max(np.trace(latents['outer']), 1e-30)
  )
  for name, moments in ('latent', latents), ('code', codes):
    result[f'{name}_dimension'] = metrics.effective_dimension(
      moments['sum'], moments['outer'], total['positions']
    )
  result |= metrics.code_statistics(counts)
  result |= metrics.bit_rates(
    int(tokens / images),
    shape[1] * shape[2],
    counts.shape[-1],
    result['entropy_bits'],
  )
  result |= {'images': int(images), 'tokens': int(tokens)}
  found = {name: result[name] for name in UNITS}
  if 'prefixes' in total:
    found['prefixes'] = _prefixes(total, counts.shape[-1])
  return found, counts


def _prefixes(total, size) -> list[dict[str, float]]:
  """The metrics of the prefixes."""
  result, images, tokens = [], total['images'], 0
  for sums in total['prefixes']:
    own = sums['counts'].sum()
    tokens += round(own / images)
    codes = metrics.code_statistics(sums['counts'])
    entry = {name: float(sums[name] / images) for name in ('mse', 'psnr')}
    entry |= {
      'tokens': tokens,
      'bits_per_image': tokens * math.log2(size),
      'quantization_error': float(sums['quantization_error'] / total['tokens']),
      'usage': codes['usage'] * size / min(size, own),
      'perplexity': codes['perplexity'],
    }
    result.append({name: entry[name] for name in PREFIX_UNITS})
  return result


def autoencoder_error(
  step, variables, batches: Iterable, *, mesh
) -> dict[str, float]:
  """autoencoder_mse, the error without quantization; see `evaluate_split`."""
  total, _ = _total(step, variables, batches, mesh)
  return {'autoencoder_mse': float(total['mse'] / total['images'])}


def _total(step, variables, batches, mesh, on_batch=None):
  """Sums of a step over all batches, float64, and the shape of a batch."""
  total, shape = None, None
  for batch in batches:
    shape = batch['image'].shape
    sums = jax.device_get(step(variables, sharding.shard_batch(batch, mesh)))
    # float64 on the host: float32 stops counting at 2^24 tokens.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    if on_batch:
      on_batch(batch, sums)
  if total is None or not total['images']:
    raise ValueError('expected a split with at least one image, got none')
  return total, shape
