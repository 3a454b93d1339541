"""Evaluates a checkpoint over a split: metrics as JSON, figures, images."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from rvq_jax import metrics, sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import prepare_images
from rvq_jax.data.sources import SPLITS
from rvq_jax.evaluation import figures
from rvq_jax.evaluation import perceptual as perceptual_lib
from rvq_jax.io import check_new, write_atomic
from rvq_jax.tokenizer.load import HUB, is_export, load
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training import validation
from rvq_jax.training.build import RunData
from rvq_jax.training.writers import read_jsonl

SHOWN_IMAGES = 8


class Evaluation(NamedTuple):
  """The result of `measure`."""

  metrics: dict[str, Any]
  counts: np.ndarray  # how often each code was chosen, [K] or [L, K]
  originals: np.ndarray  # the first images, uint8 [n, h, w, 3]
  reconstructions: np.ndarray  # of these


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
  """Evaluates a checkpoint and writes the results to WORKDIR/evaluation/SPLIT.

  `write_evaluation` lists the files. SPLIT is input where `images` is given.

  Args:
    workdir: directory of a run, an export or a name of the Hub; see `load`.
    split: 'train', 'validation' or 'test'.
    step: a saved step, 'best', or None for the newest.
    data_dir: where the data set is now; None: where it was in training.
    images: an image, a folder or a data set to measure instead of the run's;
      `split` chooses among its splits, if it has any.
    output: folder to write to instead of WORKDIR/evaluation; its SPLIT must be
      new or empty.
    save_images: new or empty folder; see `perceptual.save_pairs`.
    perceptual: adds LPIPS, rFID and others; see `perceptual_metrics`. rFID and
      IS run in PyTorch: on a GPU, start the process with
      XLA_PYTHON_CLIENT_PREALLOCATE=false, as launch/evaluate.py does.
    definitions: adds usage and perplexity by `metrics.CodeDefinitions`.

  Returns:
    The metrics of `measure` and, if asked for, of `perceptual_metrics`.

  Raises:
    ValueError: no such split, no data, a folder that holds files or cannot be
      written to.
    FileNotFoundError: there is no such run or step.
    ImportError: `perceptual` finds no package to measure with.
  """
  folder = _checked(workdir, split, images, output, save_images, perceptual)
  functions = perceptual_lib.load_metrics() if perceptual else {}
  tokenizer = load(workdir, step)
  _make_folder(folder)
  data, mesh = RunData(tokenizer.config), sharding.data_mesh()
  source, about = _open_source(workdir, data, split, step, images, data_dir)
  batches = loaders.eval_batches(
    source,
    # As many rows on each device; rows without an image are masked.
    batch_size=-(-data.batch_size // mesh.size) * mesh.size,
    image_size=data.image_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with tempfile.TemporaryDirectory() as scratch:
    pairs = save_images or (scratch if perceptual else None)
    if pairs:
      batches = perceptual_lib.save_pairs(pairs, batches, tokenizer)
    evaluation = measure(tokenizer, batches, mesh=mesh, definitions=definitions)
    if perceptual:
      more = perceptual_lib.perceptual_metrics(pairs, functions)
      evaluation.metrics.update(more)
  if jax.process_index() == 0:
    about = {'step': tokenizer.step, 'split': split} | about
    write_evaluation(folder, evaluation, about, Path(workdir) / 'metrics.jsonl')
  return evaluation.metrics


def measure(
  tokenizer: Tokenizer, batches: Iterable, *, mesh, definitions: bool = False
) -> Evaluation:
  """Measures a tokenizer over all batches; writes nothing.

  Args:
    tokenizer: the model.
    batches: {'image': uint8 [B, h, w, 3], 'mask': bool [B]}; the mesh divides
      B, and each process gives its share.
    mesh: the devices, from `data_mesh`.
    definitions: adds 'definitions', from `metrics.CodeDefinitions`.

  Returns:
    Metrics named in `UNITS`; for residual and multi-scale tokens 'prefixes'
    (`PREFIX_UNITS` of each); on process 0 roundtrip_error, the largest
    difference between decode(encode(x)) and the model's forward pass.

  Raises:
    ValueError: the batches hold no image.
  """
  codes, shown = metrics.CodeDefinitions(), []

  def on_batch(batch, sums):
    codes.add(sums['counts'])
    if not shown:
      shown.extend(batch['image'][batch['mask']][:SHOWN_IMAGES])

  everywhere = sharding.replicated(mesh)
  eval_step = jax.jit(
    validation.make_eval_step(tokenizer.model, prefixes=tokenizer.prefixes),
    in_shardings=(everywhere, sharding.by_rows(mesh)),
    out_shardings=everywhere,
  )
  variables = sharding.replicate(tokenizer.variables, mesh)
  result, counts = validation.evaluate_split(
    eval_step, variables, batches, mesh=mesh, on_batch=on_batch
  )
  originals = reconstructions = np.asarray(shown)
  if jax.process_index() == 0:
    decoded = tokenizer.reconstruct(originals)
    reconstructions = np.asarray(metrics.to_uint8(decoded))
    result |= _roundtrip_error(tokenizer, prepare_images(originals))
  if definitions:
    result['definitions'] = codes.result()
  return Evaluation(result, counts, originals, reconstructions)


def _roundtrip_error(tokenizer, images) -> dict:
  forward = jax.jit(tokenizer.model.apply)(tokenizer.variables, images)
  error = abs(tokenizer.reconstruct(images) - forward.reconstruction)
  return {
    'roundtrip_error': float(error.max(initial=0.0)),
    'roundtrip_error_definition': 'max |decode(encode(x)) - forward pass| on '
    f'[-1, 1], {len(images)} images',
  }


def write_evaluation(folder, evaluation: Evaluation, about, log) -> None:
  """Writes metrics and figures into an existing folder.

  metrics.json (`about`, then the metrics), code_counts.npy, samples.png (the
  first images above their reconstructions), reconstructions.png,
  code_usage.png, prefixes.png with 'prefixes', ../curves.png with a log.

  Args:
    folder: its Path.
    evaluation: from `measure`.
    about: what was measured, as JSON; 'step' names the model in figures.
    log: Path of the run's metrics.jsonl, if there is one.
  """
  text = json.dumps(about | evaluation.metrics, indent=2) + '\n'
  write_atomic(folder / 'metrics.json', text)
  np.save(folder / 'code_counts.npy', evaluation.counts, allow_pickle=False)
  _draw(folder, evaluation, f'step {about["step"]:,}', log)


def _draw(folder, evaluation, name, log):
  result, counts, originals, images = evaluation
  strip = metrics.reconstruction_grid(originals, images)
  Image.fromarray(strip).save(folder / 'samples.png')
  drawings = {
    'reconstructions': figures.reconstructions(originals, {name: images}),
    'code_usage': figures.code_usage({name: counts}),
  }
  if 'prefixes' in result:
    drawings['prefixes'] = figures.prefixes({name: result['prefixes']})
  if log.exists():
    drawings['../curves'] = figures.curves({'this run': [read_jsonl(log)]})
  for file, figure in drawings.items():
    figure.savefig(folder / f'{file}.png', dpi=140)


def format_table(result: dict, title: str) -> str:
  """The metrics as lines of aligned text: name, value, meaning."""
  lines, columns = [title], validation.PREFIX_UNITS
  for name, value in result.items():
    if isinstance(value, int | float):
      text = f'{value:,}' if isinstance(value, int) else f'{value:,.4f}'
      text = f'{value:.2%}' if name == 'usage' else text
      meaning = validation.UNITS.get(name) or result[f'{name}_definition']
      lines.append(f'  {name:<23}{text:>12}  {meaning}')
  if 'prefixes' in result:
    lines.append('  only the first codes')
    lines.append(''.join(f'{name:>20}' for name in columns))
    for entry in result['prefixes']:
      lines.append(''.join(f'{entry[name]:>20,.6g}' for name in columns))
  return '\n'.join(lines)


def _checked(workdir, split, images, output, save_images, perceptual) -> Path:
  """The folder to write to, once nothing speaks against the request."""
  if split not in SPLITS:
    raise ValueError(
      f'split: expected one of {", ".join(SPLITS)}, got {split!r}'
    )
  if (save_images or perceptual) and jax.process_count() > 1:
    raise ValueError(
      'save_images, perceptual: expected a single process, got '
      f'{jax.process_count()}; evaluate the checkpoint on one host'
    )
  if save_images:
    check_new(save_images, 'save_images')
  if str(workdir).startswith(HUB) and not output:
    raise ValueError(f'output: expected a folder for the results of {workdir}')
  folder = Path(output or Path(workdir) / 'evaluation')
  folder /= 'input' if images else split
  if output:
    check_new(folder, 'output')
  return folder


def _make_folder(folder: Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(errno.EACCES, 'Permission denied')
  except OSError as error:
    raise ValueError(
      f'output: cannot write to {folder}: {error.strerror}; name another folder'
    ) from error


def _open_source(workdir, data, split, step, images, data_dir):
  """The images to measure, and the lines of metrics.json about them."""
  about = {'data': data.name, 'data_split': data.split}
  about |= {'chosen_on_these_images': False}
  about |= {'ssim_variant': metrics.SSIM_VARIANT}
  data_dir = data_dir or data.data_dir
  if images:
    splits = datasets.open_images(images, data_dir=data_dir)
    if 'all' not in splits and split not in splits:
      raise ValueError(
        f'split: expected one of {", ".join(splits)} of {images}, got {split}'
      )
    about |= {'data': images, 'data_split': None}
    return splits['all' if 'all' in splits else split], about
  shared = str(workdir).startswith(HUB) or is_export(workdir)
  if shared and data.name.startswith('folder:'):
    raise ValueError(
      'images: expected a folder or a data set (--input): an export does not '
      'tell where the images of its run lie, nor which it was trained on'
    )
  dataset = datasets.open_dataset(
    data.name,
    split=data.split,
    data_dir=data_dir,
    split_file=Path(workdir) / datasets.SPLIT_FILE,
  )
  if dataset.note:
    logging.info('%s', dataset.note)
  source = getattr(dataset, split)
  if step == 'best' and source is dataset.validation:
    about['chosen_on_these_images'] = True
    logging.warning(
      "'best' was chosen on these images: its numbers are too good; report the "
      'newest step or a split that is held out'
    )
  return source, about
