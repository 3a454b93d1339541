"""Evaluation over a whole split, from sums."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from rvq_jax.data import loaders, sources
from rvq_jax.data.transforms import to_float, to_uint8
from rvq_jax.evaluation import figures, metrics
from rvq_jax.evaluation.tokenizer import load
from rvq_jax.training import settings, sharding
from rvq_jax.training.step import make_eval_step

SPLITS = ('train', 'validation', 'test')
SHOWN_IMAGES = 8

UNITS = {
  'mse': 'mean squared error on [-1, 1]',
  'mse_01': 'mean squared error on [0, 1]',
  'psnr': 'dB, mean over images, after rounding to uint8',
  'ssim': 'mean over images',
  'usage': 'share of the codes chosen at least once in the split',
  'perplexity': 'exp(entropy of the codes), higher is more even',
  'perplexity_ratio': 'perplexity / K',
  'entropy_bits': "bits a token at the codes' frequencies",
  'bits_per_image': 'tokens x log2 K',
  'bits_per_pixel': 'bits_per_image / pixels',
  'entropy_bits_per_pixel': 'tokens x entropy_bits / pixels',
  'quantization_error': 'mean squared distance to the code, per number',
  'images': 'images in the split that could be read',
  'tokens': 'tokens of these images',
}


def evaluate_split(
  eval_step, variables, batches: Iterable, *, mesh
) -> tuple[dict[str, float], np.ndarray]:
  """Metrics of a model over all batches of a split.

  Args:
    eval_step: from `make_eval_step`, jitted.
    variables: the model's collections.
    batches: {'image': [B, h, w, 3] uint8, 'mask': [B] bool} on the host; each
      process gives its share.
    mesh: the devices, from `data_mesh`.

  Returns:
    The metrics named in `UNITS`, and the codes' counts [K].

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
    counts.size,
    result['entropy_bits'],
  )
  result |= {'images': int(images), 'tokens': int(tokens)}
  return {name: result[name] for name in UNITS}, counts


def format_table(result: dict[str, float], title: str) -> str:
  """The metrics as lines of aligned text: name, value, meaning."""
  lines = [title]
  for name, value in result.items():
    if isinstance(value, int):
      text = f'{value:,}'
    elif name == 'usage':
      text = f'{value:.2%}'
    else:
      text = f'{value:,.4f}' if abs(value) < 100 else f'{value:,.1f}'
    lines.append(f'  {name:<23}{text:>12}  {UNITS[name]}')
  return '\n'.join(lines)


def evaluate_run(
  workdir,
  *,
  split: str = 'test',
  step: int | str | None = None,
  data_dir: str | None = None,
) -> dict[str, float]:
  """Evaluates a checkpoint and writes its metrics and figures.

  Writes WORKDIR/evaluation/SPLIT/metrics.json (with step, data set and the
  variant of SSIM), reconstructions.png, code_usage.png and, one level up,
  curves.png.

  Args:
    workdir: directory of a run.
    split: 'train', 'validation' or 'test' of the run's data set.
    step: a saved step, 'best', or None for the newest.
    data_dir: where the data set is now; None: where it was in training.

  Returns:
    The metrics named in `UNITS`.

  Raises:
    ValueError: the split is unknown, or the data is not there.
    FileNotFoundError: there is no such run or step.
  """
  if split not in SPLITS:
    raise ValueError(
      f'split: expected one of {", ".join(SPLITS)}; got {split!r}'
    )
  tokenizer = load(workdir, step)
  config = tokenizer.config
  dataset = sources.open_dataset(
    config['data.name'],
    split=config['data.split'],
    data_dir=data_dir or config['data.data_dir'],
  )
  if dataset.note:
    logging.info('%s', dataset.note)
  mesh = sharding.data_mesh()
  settings.check_devices(config['batch_size'], mesh.size)
  everywhere = sharding.replicated(mesh)
  eval_step = jax.jit(
    make_eval_step(tokenizer.model),
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )

  def batches():
    return loaders.eval_batches(
      getattr(dataset, split),
      batch_size=config['batch_size'],
      image_size=config['data.image_size'],
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  result, counts = evaluate_split(
    eval_step,
    jax.device_put(tokenizer.variables, everywhere),
    batches(),
    mesh=mesh,
  )
  if jax.process_index() == 0:
    _write(Path(workdir), split, tokenizer, result, counts, next(batches()))
  return result


def _write(workdir, split, tokenizer, result, counts, batch):
  folder = workdir / 'evaluation' / split
  folder.mkdir(parents=True, exist_ok=True)
  about = {
    'step': tokenizer.step,
    'data': tokenizer.config['data.name'],
    'data_split': tokenizer.config['data.split'],
    'split': split,
    'ssim_variant': metrics.SSIM_VARIANT,
  }
  text = json.dumps(about | result, indent=2)
  (folder / 'metrics.json').write_text(text + '\n')
  originals = batch['image'][batch['mask']][:SHOWN_IMAGES]
  images = tokenizer.reconstruct(originals)
  figures.save_reconstructions(
    folder / 'reconstructions.png',
    originals,
    np.asarray(to_uint8(images)),
    np.asarray(metrics.psnr(images, to_float(originals))),
  )
  figures.save_code_usage(folder / 'code_usage.png', counts)
  if (workdir / 'metrics.jsonl').exists():
    figures.save_curves(workdir / 'evaluation' / 'curves.png', workdir)
