"""Evaluates a checkpoint over a split: metrics as JSON, figures, images."""

import errno
import json
import logging
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax import metrics, sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import prepare_images
from rvq_jax.data.sources import SPLITS
from rvq_jax.evaluation import figures
from rvq_jax.evaluation import perceptual as networks
from rvq_jax.io import write_atomic
from rvq_jax.tokenizer.export import check_new
from rvq_jax.tokenizer.load import HUB, is_export, load
from rvq_jax.training.validation import (
  PREFIX_UNITS,
  UNITS,
  evaluate_split,
  make_eval_step,
)
from rvq_jax.training.writers import read_jsonl

SHOWN_IMAGES = 8


def format_table(result: dict, title: str) -> str:
  """The metrics as lines of aligned text: name, value, meaning."""
  lines = [title]
  for name, value in result.items():
    if isinstance(value, int | float):
      text = f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'
      text = f'{value:.2%}' if name == 'usage' else text
      meaning = UNITS.get(name) or result[f'{name}_definition']
      lines.append(f'  {name:<23}{text:>12}  {meaning}')
  if 'prefixes' in result:
    lines.append('  the first codes alone')
    lines.append(''.join(f'{name:>20}' for name in PREFIX_UNITS))
    for entry in result['prefixes']:
      lines.append(''.join(f'{entry[name]:>20,.6g}' for name in PREFIX_UNITS))
  return '\n'.join(lines)


def evaluate_run(
  workdir,
  *,
  split: str = 'test',
  step: int | str | None = None,
  data_dir: str | None = None,
  images: str | None = None,
  output: str | None = None,
  save_images: str | None = None,
  perceptual: bool = False,
  definitions: bool = False,
) -> dict:
  """Evaluates a checkpoint and writes its metrics and figures.

  Writes WORKDIR/evaluation/SPLIT/metrics.json (with step, data set, the variant
  of SSIM and whether 'best' was chosen on these images), reconstructions.png,
  samples.png (the first images above their reconstructions, pixel by pixel),
  code_usage.png, code_counts.npy, for residual and multi-scale tokens
  prefixes.png and, one level up, curves.png. SPLIT is input where `images` is
  given.

  Args:
    workdir: directory of a run, an export or a name of the Hub; see `load`.
    split: 'train', 'validation' or 'test' of the run's data set.
    step: a saved step, 'best', or None for the newest.
    data_dir: where the data set is now; None: where it was in training.
    images: an image, a folder or a data set to measure instead; of the splits
      that it has `split` is taken.
    output: folder to write to instead of WORKDIR/evaluation; the folder of the
      split in it must be new or empty.
    save_images: new or empty folder for the whole split and its reconstructions
      as PNG files; see `perceptual.save_pairs`.
    perceptual: adds LPIPS, rFID and others; see `perceptual_metrics`.
      rFID and IS run in PyTorch: on a GPU, start the process with
      XLA_PYTHON_CLIENT_PREALLOCATE=false, as launch/evaluate.py does.
    definitions: adds usage and perplexity by `metrics.CodeDefinitions`.

  Returns:
    The metrics named in `UNITS`, of residual and multi-scale tokens 'prefixes'
    (`validation.PREFIX_UNITS` of each), roundtrip_error (of a few images: the
    largest difference between decode(encode(x)) and the model's forward pass),
    those of `perceptual`, and 'definitions'.

  Raises:
    ValueError: no such split, no data, save_images or output holds files, or
      there is no right to write.
    FileNotFoundError: there is no such run or step.
    ImportError: `perceptual` finds no package to measure with.
  """
  if split not in SPLITS:
    raise ValueError(
      f'split: expected one of {", ".join(SPLITS)}, got {split!r}'
    )
  if perceptual:
    opened = networks.open_metrics()
  if (save_images or perceptual) and jax.process_count() > 1:
    raise ValueError(
      'save_images, perceptual: expected a single process, got '
      f'{jax.process_count()}; evaluate the checkpoint on one host'
    )
  if save_images:
    check_new(save_images, 'save_images')
  if str(workdir).startswith(HUB) and not output:
    raise ValueError(f'expected --output=FOLDER for the results of {workdir}')
  folder = Path(output or Path(workdir) / 'evaluation')
  folder /= 'input' if images else split
  if output:
    check_new(folder, 'output')
  tokenizer = load(workdir, step)
  _make_folder(folder)
  source, chosen_here = _open_source(
    workdir, tokenizer.config, split, data_dir, images
  )
  chosen_here &= step == 'best'
  if chosen_here:
    logging.warning(
      "'best' was chosen on these images, so that its numbers are too good; "
      'report the newest step, or a split that is held out'
    )
  codes, originals, position = metrics.CodeDefinitions(), (), 0

  with tempfile.TemporaryDirectory() as scratch:
    saved = save_images or (scratch if perceptual else None)

    def on_batch(batch, sums):
      nonlocal originals, position
      image, mask = batch['image'], batch['mask']
      codes.add(sums['counts'])
      originals = originals if len(originals) else image[mask][:SHOWN_IMAGES]
      if saved:
        pair = image, _reconstruct(tokenizer, image)
        networks.save_pairs(saved, position, pair, mask)
      position += len(mask)

    result, counts = _measure(tokenizer, source, on_batch)
    if jax.process_index() == 0:
      result |= _roundtrip_error(tokenizer, originals)
    if perceptual:
      result |= networks.perceptual_metrics(saved, opened)
  if definitions:
    result['definitions'] = codes.result()
  if jax.process_index() == 0:
    config, about = tokenizer.config, {'step': tokenizer.step, 'split': split}
    about |= {'data': config['data.name'], 'data_split': config['data.split']}
    if images:
      about |= {'data': images, 'data_split': None}
    about |= {'chosen_on_these_images': chosen_here}
    about |= {'ssim_variant': metrics.SSIM_VARIANT}
    text = json.dumps(about | result, indent=2) + '\n'
    write_atomic(folder / 'metrics.json', text)
    np.save(folder / 'code_counts.npy', counts, allow_pickle=False)
    log = Path(workdir) / 'metrics.jsonl'
    _draw(folder, tokenizer, originals, counts, result, log)
  return result


def _make_folder(folder: Path) -> None:
  """Makes the folder to write to, before the work."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(errno.EACCES, 'Permission denied')
  except OSError as error:
    raise ValueError(
      f'cannot write to {folder}: {error.strerror}; pass --output=FOLDER'
    ) from error


def _open_source(workdir, config, split, data_dir, images):
  """The images to measure, and whether a run's validation is on them."""
  data_dir = data_dir or config['data.data_dir']
  if images:
    splits = datasets.open_images(images, data_dir=data_dir)
    if 'all' not in splits and split not in splits:
      raise ValueError(
        f'split: expected one of {", ".join(splits)} of {images}, got {split}'
      )
    return splits['all' if 'all' in splits else split], False
  name = config['data.name']
  if name.startswith('folder:') and (
    str(workdir).startswith(HUB) or is_export(workdir)
  ):
    raise ValueError(
      'expected --input=IMAGES: an export does not tell where the images of '
      'its run lie, nor which of them it was trained on'
    )
  dataset = datasets.open_dataset(
    name,
    split=config['data.split'],
    data_dir=data_dir,
    split_file=Path(workdir) / datasets.SPLIT_FILE,
  )
  if dataset.note:
    logging.info('%s', dataset.note)
  source = getattr(dataset, split)
  return source, source is dataset.validation


def _reconstruct(tokenizer, images) -> np.ndarray:
  return np.asarray(metrics.to_uint8(tokenizer.reconstruct(images)))


def _roundtrip_error(tokenizer, images) -> dict:
  images = prepare_images(np.asarray(images))
  forward = jax.jit(tokenizer.model.apply)(tokenizer.variables, images)
  error = abs(tokenizer.reconstruct(images) - forward.reconstruction)
  return {
    'roundtrip_error': float(error.max(initial=0.0)),
    'roundtrip_error_definition': 'max |decode(encode(x)) - forward pass| on '
    f'[-1, 1], {len(images)} images',
  }


def _measure(tokenizer, source, on_batch):
  """The metrics and code counts of a source."""
  config, mesh = tokenizer.config, sharding.data_mesh()
  # As many rows on each device; those without an image are masked.
  batch_size = -(-config['batch_size'] // mesh.size) * mesh.size
  batches = loaders.eval_batches(
    source,
    batch_size=batch_size,
    image_size=config['data.image_size'],
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  everywhere = sharding.replicated(mesh)
  eval_step = jax.jit(
    make_eval_step(tokenizer.model, prefixes=tokenizer.prefixes),
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  variables = sharding.replicate(tokenizer.variables, mesh)
  return evaluate_split(
    eval_step, variables, batches, mesh=mesh, on_batch=on_batch
  )


def _draw(folder, tokenizer, originals, counts, result, log):
  """The figures of a split, and the curves of the run beside it."""
  name, images = f'step {tokenizer.step:,}', _reconstruct(tokenizer, originals)
  strip = metrics.reconstruction_grid(originals, images)
  Image.fromarray(strip).save(folder / 'samples.png')
  drawn = {
    'reconstructions': figures.reconstructions(originals, {name: images}),
    'code_usage': figures.code_usage({name: counts}),
  }
  if 'prefixes' in result:
    drawn['prefixes'] = figures.prefixes({name: result['prefixes']})
  if log.exists():
    drawn['../curves'] = figures.curves({'this run': [read_jsonl(log)]})
  for file, figure in drawn.items():
    figure.savefig(folder / f'{file}.png', dpi=140)
