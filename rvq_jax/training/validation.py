"""The evaluation step, and metrics of a whole split from sums."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax import metrics, sharding
from rvq_jax.data import loaders
from rvq_jax.metrics import prepare_images, to_float
from rvq_jax.quantize.codebook import count_codes

GRID_IMAGES = 8
KEPT_LIMIT = 2**28  # bytes of decoded images
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
  'relative_error': 'squared distance of the latents to their codes / |z|^2',
  'ambiguous_share': 'share of the tokens with two codes too close for float32',
  'latent_dimension': 'effective dimension of the latents',
  'latent_components_99': 'components with 99 % of their variance',
  'code_dimension': "effective dimension of the latents' codes",
  'code_components_99': "components with 99 % of these codes' variance",
  'images': 'readable images in the split',
  'tokens': 'tokens of these images',
}
"""Metric -> its unit and meaning."""

PREFIX_UNITS = {
  'tokens': 'decoded codes per image',
  **{n: UNITS[n] for n in ('bits_per_image', 'mse', 'psnr')},
  'quantization_error': UNITS['quantization_error'],
  'usage': "the last level's number of codes over the smaller of K and its "
  'tokens in the split',
  'perplexity': "the last level's",
}
"""Metric of a prefix of the codes -> its unit and meaning."""


def make_eval_step(
  model, *, prefixes: Sequence[int] = (), quantize: bool = True
):
  """Builds `eval_step(variables, batch) -> sums` over the valid images.

  Args:
    model: a `VQVAE`.
    prefixes: lengths of the last axis of ids to decode too, ascending up to the
      whole axis; see `Tokenizer.prefixes`.
    quantize: False: the decoder gets the latents; the sums are images and mse.

  Returns:
    A function of the model's variables and {'image': [B, h, w, 3] uint8 or
    float in [-1, 1], 'mask': bool [B]}. Its float32 sums are images, mse, psnr,
    ssim, tokens, positions, quantization_error, ambiguous, latent_error
    (|z - q|^2), 'latents' and 'codes' (`_moments`), counts [K], and for each of
    'prefixes' mse, psnr, quantization_error and the counts [K] of its added
    codes.
  """

  def eval_step(variables, batch):
    images, mask = prepare_images(batch['image']), batch['mask']
    out = model.apply(variables, images, mask=mask, quantize=quantize)
    sums = _image_sums(out.reconstruction, images, mask)
    count = sums['images'] = jnp.sum(mask.astype(jnp.float32))
    if not quantize:
      return {name: sums[name] for name in ('images', 'mse')}
    z, q = out.latents, out.quantizer.quantized.astype(jnp.float32)
    z = model.vq.normed(z.astype(jnp.float32))
    tokens = out.quantizer.ids[0].size * count
    errors = jnp.sum((z - q) ** 2, axis=(1, 2, 3))
    sums |= {
      'tokens': tokens,
      'positions': z[0, ..., 0].size * count,
      'quantization_error': tokens
      * out.quantizer.metrics['quantization_error'],
      'ambiguous': tokens * out.quantizer.metrics.get('ambiguous_share', 0.0),
      'latent_error': jnp.sum(jnp.where(mask, errors, 0.0)),
      'latents': _moments(z, mask),
      'codes': _moments(q, mask),
      'counts': out.quantizer.counts,
    }
    if prefixes:
      sums['prefixes'] = list(prefix_sums(variables, out, images, mask, tokens))
    return sums

  def prefix_sums(variables, out, images, mask, tokens):
    ids, size, first = out.quantizer.ids, model.vq.codebook_size, 0
    for level, end in enumerate(prefixes, 1):
      reconstruction = out.reconstruction
      if end < ids.shape[-1]:
        reconstruction = model.apply(variables, ids[..., :end], method='decode')
      added, error = ids[..., first:end], f'quantization_error_{level}'
      weight = jnp.repeat(mask, added[0].size)
      sums = _image_sums(reconstruction, images, mask)
      yield {
        'mse': sums['mse'],
        'psnr': sums['psnr'],
        'quantization_error': tokens * out.quantizer.metrics[error],
        'counts': count_codes(added.ravel(), size, weight=weight),
      }
      first = end

  return eval_step


def _image_sums(reconstruction, images, mask):
  """Sums of the metrics of reconstructions over the valid images."""
  functions = {'mse': metrics.squared_error}
  functions |= {'psnr': metrics.psnr, 'ssim': metrics.ssim}
  return {
    name: jnp.sum(jnp.where(mask, per_image(reconstruction, images), 0.0))
    for name, per_image in functions.items()
  }


def _moments(x, mask):
  """Sums over valid positions of x [B, H, W, D] and of x x^T [D, D]."""
  x = jnp.where(mask[:, None, None, None], x, 0.0).reshape(-1, x.shape[-1])
  return {'sum': jnp.sum(x, axis=0), 'outer': x.T @ x}


@functools.lru_cache(maxsize=8)
def compile_eval_step(model, mesh, **options):
  """`make_eval_step(model, **options)` for the devices of a mesh."""
  return jax.jit(
    make_eval_step(model, **options),
    in_shardings=(sharding.replicated(mesh), sharding.by_rows(mesh)),
    out_shardings=sharding.replicated(mesh),
  )


def evaluate_split(
  eval_step,
  variables,
  batches: Iterable,
  *,
  mesh,
  on_batch: Callable[[dict, dict], None] = lambda batch, sums: None,
) -> tuple[dict[str, float], np.ndarray | None]:
  """Computes the metrics of a model over all batches of a split.

  Args:
    eval_step: from `make_eval_step`, jitted.
    variables: the model's collections.
    batches: {'image': [B, h, w, 3] uint8, 'mask': [B] bool} on the host, of
      this process; ValueError if none of the images is valid.
    mesh: from `data_mesh`.
    on_batch: called with each batch and its sums.

  Returns:
    The metrics in `UNITS`, with prefixes also 'prefixes', each as in
    `PREFIX_UNITS`; and the codes' counts [K], or [L, K] for L codebooks.
    Without quantization: autoencoder_mse, None.
  """
  total, shape = None, None
  for batch in batches:
    shape = batch['image'].shape
    placed = sharding.shard_batch(batch, mesh)
    sums = jax.device_get(eval_step(variables, placed))
    # float64 on the host: float32 cannot count beyond 2^24 tokens.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    on_batch(batch, sums)
  if total is None or not total['images']:
    raise ValueError('expected a split with at least one image, got none')
  if 'counts' not in total:
    return {'autoencoder_mse': float(total['mse'] / total['images'])}, None
  return _metrics(total, pixels=shape[1] * shape[2]), total['counts']


def _metrics(total, pixels):
  images, tokens, counts = total['images'], total['tokens'], total['counts']
  result = {n: float(total[n] / images) for n in ('mse', 'psnr', 'ssim')}
  size = max(np.trace(total['latents']['outer']), 1e-30)
  result |= {
    'mse_01': result['mse'] / 4,
    'quantization_error': float(total['quantization_error'] / tokens),
    'relative_error': float(total['latent_error'] / size),
    'ambiguous_share': float(total['ambiguous'] / tokens),
    'images': int(images),
    'tokens': int(tokens),
  }
  for name in ('latent', 'code'):
    moments = total[f'{name}s']
    sums = moments['sum'], moments['outer'], total['positions']
    result[f'{name}_dimension'] = metrics.effective_dimension(*sums)
    result[f'{name}_components_99'] = metrics.components_99(*sums)
  result |= metrics.code_statistics(counts)
  result |= metrics.bit_rates(
    int(tokens / images), pixels, counts.shape[-1], result['entropy_bits']
  )
  result = {name: result[name] for name in UNITS}
  if 'prefixes' in total:
    result['prefixes'] = list(_prefixes(total, counts.shape[-1]))
  return result


def _prefixes(total, size):
  images, tokens = total['images'], 0
  for sums in total['prefixes']:
    added = sums['counts'].sum()
    tokens += round(added / images)
    codes = metrics.code_statistics(sums['counts'])
    yield {
      'tokens': tokens,
      'bits_per_image': tokens * math.log2(size),
      'mse': float(sums['mse'] / images),
      'psnr': float(sums['psnr'] / images),
      'quantization_error': float(sums['quantization_error'] / total['tokens']),
      'usage': codes['usage'] * size / min(size, added),
      'perplexity': codes['perplexity'],
    }


class Split:
  """The validation images of a run; each iteration reads them again.

  Yields this process's batches like `loaders.eval_batches`; a split of at most
  256 MiB stays decoded after the first iteration.
  """

  def __init__(self, source, *, batch_size: int, image_size: int):
    # Unreadable images must not end a run that has trained.
    self._read = functools.partial(
      loaders.eval_batches, source, image_size=image_size, limited=False
    )
    self._batch_size, self._kept = batch_size, None
    self._small = len(source) * image_size**2 * 3 <= KEPT_LIMIT

  def __iter__(self):
    if self._kept is not None:
      yield from self._kept
      return
    kept = []
    for batch in self._read(
      batch_size=self._batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    ):
      kept += [batch] * self._small
      yield batch
    self._kept = kept if self._small else None

  @functools.cached_property
  def first_images(self) -> np.ndarray:
    """The first `GRID_IMAGES` images, uint8, the same in every process."""
    first = next(self._read(batch_size=GRID_IMAGES))
    return first['image'][first['mask']]


def validate(model, variables, split: Split, *, mesh, quantize):
  """Metrics and counts as in `evaluate_split`, and a grid of pictures.

  The grid, uint8, shows the first images of the split above their
  reconstructions. For quantize see `make_eval_step`.
  """
  eval_step = compile_eval_step(model, mesh, quantize=quantize)
  result = evaluate_split(eval_step, variables, split, mesh=mesh)
  images = split.first_images
  outputs = _reconstruct(model, mesh, quantize, variables, images)
  return *result, metrics.reconstruction_grid(images, np.asarray(outputs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _reconstruct(model, mesh, quantize, variables, images):
  out = model.apply(variables, to_float(images), quantize=quantize)
  images = metrics.to_uint8(out.reconstruction)
  return jax.lax.with_sharding_constraint(images, sharding.replicated(mesh))
