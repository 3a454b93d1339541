"""Evaluates a checkpoint over a split: metrics as JSON, figures, images."""

import json
import logging
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax import metrics
from rvq_jax.data import datasets, loaders
from rvq_jax.evaluation import figures, perceptual
from rvq_jax.evaluation.load import load
from rvq_jax.io import write_atomic
from rvq_jax.training import config as config_lib
from rvq_jax.training import sharding
from rvq_jax.training.validation import UNITS, evaluate_split, make_eval_step
from rvq_jax.training.writers import read_jsonl

SPLITS = ('train', 'validation', 'test')
SHOWN_IMAGES = 8


def format_table(result: dict, title: str) -> str:
  """The metrics as lines of aligned text: name, value, meaning."""
  lines = [title]
  for name, value in result.items():
    if not isinstance(value, int | float):
      continue
    text = f'{value:,.4f}' if abs(value) < 100 else f'{value:,.1f}'
    if isinstance(value, int):
      text = f'{value:,}'
    elif name == 'usage':
      text = f'{value:.2%}'
    meaning = UNITS.get(name) or result[f'{name}_definition']
    lines.append(f'  {name:<23}{text:>12}  {meaning}')
  return '\n'.join(lines)


def evaluate_run(
  workdir,
  *,
  split: str = 'test',
  step: int | str | None = None,
  data_dir: str | None = None,
  save_images: str | None = None,
  perceptual_metrics: bool = False,
  definitions: bool = False,
) -> dict:
  """Evaluates a checkpoint and writes its metrics and figures.

  Writes WORKDIR/evaluation/SPLIT/metrics.json (with step, data set and the
  variant of SSIM), reconstructions.png, samples.png (the first images above
  their reconstructions, pixel by pixel), code_usage.png, code_counts.npy and,
  one level up, curves.png.

  Args:
    workdir: directory of a run.
    split: 'train', 'validation' or 'test' of the run's data set.
    step: a saved step, 'best', or None for the newest.
    data_dir: where the data set is now; None: where it was in training.
    save_images: new or empty folder for the whole split and its reconstructions
      as PNG files; see `perceptual.save_pairs`.
    perceptual_metrics: adds those of `perceptual.perceptual_metrics`.
    definitions: adds usage and perplexity as others define them; see
      `metrics.CodeDefinitions`.

  Returns:
    The metrics named in `UNITS`; the perceptual ones where asked for; and under
    'definitions' those of `CodeDefinitions`.

  Raises:
    ValueError: the split is unknown, the data is not there, or save_images
      holds files.
    FileNotFoundError: there is no such run or step.
    ImportError: `perceptual_metrics` needs a package that is missing.
  """
  _check(split, save_images, perceptual_metrics)
  tokenizer = load(workdir, step)
  codes, originals, position = metrics.CodeDefinitions(), (), 0
  with tempfile.TemporaryDirectory() as scratch:
    saved = save_images or (scratch if perceptual_metrics else None)

    def on_batch(batch, sums):
      nonlocal originals, position
      images, mask = batch['image'], batch['mask']
      codes.add(sums['counts'])
      originals = originals if len(originals) else images[mask][:SHOWN_IMAGES]
      if saved:
        pair = images, _reconstruct(tokenizer, images)
        perceptual.save_pairs(saved, position, pair, mask)
      position += len(mask)

    result, counts = _measure(tokenizer, split, data_dir, on_batch)
    if perceptual_metrics:
      result |= perceptual.perceptual_metrics(saved)
  if definitions:
    result['definitions'] = codes.result()
  if jax.process_index() == 0:
    folder = Path(workdir) / 'evaluation' / split
    folder.mkdir(parents=True, exist_ok=True)
    about = {'step': tokenizer.step, 'data': tokenizer.config['data.name']}
    about |= {'data_split': tokenizer.config['data.split'], 'split': split}
    about['ssim_variant'] = metrics.SSIM_VARIANT
    text = json.dumps(about | result, indent=2) + '\n'
    write_atomic(folder / 'metrics.json', text)
    np.save(folder / 'code_counts.npy', counts, allow_pickle=False)
    _draw(folder, tokenizer, originals, counts)
  return result


def _check(split, save_images, perceptual_metrics):
  if split not in SPLITS:
    raise ValueError(
      f'split: expected one of {", ".join(SPLITS)}; got {split!r}'
    )
  if perceptual_metrics:
    perceptual.import_packages()
  if (save_images or perceptual_metrics) and jax.process_count() > 1:
    raise ValueError(
      'save_images, perceptual: expected a single process, got '
      f'{jax.process_count()}; evaluate the checkpoint on one host'
    )
  if save_images and Path(save_images).exists():
    if not Path(save_images).is_dir() or any(Path(save_images).iterdir()):
      raise ValueError(
        f'save_images: expected a new or empty folder, got {save_images}; '
        'name another one, or remove it'
      )


def _reconstruct(tokenizer, images) -> np.ndarray:
  return np.asarray(metrics.to_uint8(tokenizer.reconstruct(images)))


def _measure(tokenizer, split, data_dir, on_batch):
  """The metrics and code counts of a split."""
  config = tokenizer.config
  dataset = datasets.open_dataset(
    config['data.name'],
    split=config['data.split'],
    data_dir=data_dir or config['data.data_dir'],
  )
  if dataset.note:
    logging.info('%s', dataset.note)
  mesh = sharding.data_mesh()
  config_lib.check_devices(config['batch_size'], mesh.size)
  everywhere = sharding.replicated(mesh)
  eval_step = jax.jit(
    make_eval_step(tokenizer.model),
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  batches = loaders.eval_batches(
    getattr(dataset, split),
    batch_size=config['batch_size'],
    image_size=config['data.image_size'],
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  variables = sharding.replicate(tokenizer.variables, mesh)
  return evaluate_split(
    eval_step, variables, batches, mesh=mesh, on_batch=on_batch
  )


def _draw(folder, tokenizer, originals, counts):
  """The figures of a split, and the curves of the run beside it."""
  name, images = f'step {tokenizer.step:,}', _reconstruct(tokenizer, originals)
  strip = metrics.reconstruction_grid(originals, images)
  Image.fromarray(strip).save(folder / 'samples.png')
  drawn = {
    folder / 'reconstructions.png': figures.reconstructions(
      originals, {name: images}
    ),
    folder / 'code_usage.png': figures.code_usage({name: counts}),
  }
  log = folder.parents[1] / 'metrics.jsonl'
  if log.exists():
    curves = figures.curves({'this run': [read_jsonl(log)]})
    drawn[folder.parent / 'curves.png'] = curves
  for path, figure in drawn.items():
    figure.savefig(path, dpi=140)
