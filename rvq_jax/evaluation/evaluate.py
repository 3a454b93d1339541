"""Evaluates a checkpoint over a split: metrics as JSON, figures, images."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax import metrics, sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.data.sources import KINDS, SPLITS
from rvq_jax.evaluation import figures
from rvq_jax.evaluation import perceptual as perceptual_lib
from rvq_jax.io import SHARED, check_folder, claim, read_json, write_atomic
from rvq_jax.metrics import prepare_images
from rvq_jax.tokenizer.load import is_export, load
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training import validation
from rvq_jax.training.build import RunData
from rvq_jax.training.writers import read_jsonl


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

  Files are metrics.json, code_counts.npy ([K] or [L, K]), and as PNG samples,
  reconstructions, code_usage, prefixes (several levels) and, for a run, curves
  (in WORKDIR/evaluation, with `output` beside the others).

  Args:
    workdir: directory of a run, an export or a name on the Hub; see `load`.
    split: 'train', 'validation' or 'test'.
    step: a saved step, 'best', or None for the newest.
    data_dir: present folder of the data set; None: as in training.
    images: an image, a folder or a data set to measure instead of the run's (of
      its splits, if any, `split`); SPLIT is then a name for this input.
    output: replaces WORKDIR/evaluation; its SPLIT must be new or empty.
    save_images: new or empty folder; see `perceptual.save_pairs`.
    perceptual: adds `perceptual_metrics`, some in PyTorch: on a GPU, start with
      XLA_PYTHON_CLIENT_PREALLOCATE=false, as `rvq evaluate` does.
    definitions: adds usage and perplexity by `metrics.CodeDefinitions`.

  Returns:
    Metrics named in `UNITS`; for residual and multi-scale tokens 'prefixes'
    (`PREFIX_UNITS` of each); roundtrip_error, on process 0; requested metrics.

  Raises:
    ValueError: no such split, no data; a folder that is not empty, writable or
      outside the images.
    FileNotFoundError: there is no such run or step.
    ImportError: `perceptual` finds no package to measure with.
  """
  folder = _checked(workdir, split, images, output, save_images, perceptual)
  functions = perceptual_lib.load_metrics() if perceptual else {}
  tokenizer = load(workdir, step)
  data, mesh = RunData(tokenizer.config), sharding.data_mesh()
  read = datasets.full_name(images) if images else data.name
  datasets.check_apart(read, folder, 'output')
  datasets.check_apart(read, save_images or folder, 'save_images')
  source, about = _open_source(workdir, data, split, step, images, data_dir)
  batches = loaders.eval_batches(
    source,
    # Each device gets as many rows; the mask hides rows without an image.
    batch_size=-(-data.batch_size // mesh.size) * mesh.size,
    image_size=data.image_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with _writing(folder, output), tempfile.TemporaryDirectory() as scratch:
    if pairs := save_images or (scratch if perceptual else None):
      batches = perceptual_lib.save_pairs(pairs, batches, tokenizer)
    result, counts, *pictures = _measure(tokenizer, batches, mesh, definitions)
    if perceptual:
      result |= perceptual_lib.perceptual_metrics(pairs, functions)
    if jax.process_index() == 0:
      about = {'step': tokenizer.step} | about
      text = json.dumps(about | result, indent=2) + '\n'
      write_atomic(folder / 'metrics.json', text)
      np.save(folder / 'code_counts.npy', counts, allow_pickle=False)
      log = Path(workdir) / 'metrics.jsonl'
      name = f'reconstruction\nat step {tokenizer.step:,}'
      curves = 'curves' if output else '../curves'
      _draw(folder, curves, log, name, result, counts, *pictures)
      logging.info('the results are in %s', folder)
  return result


def _measure(tokenizer: Tokenizer, batches: Iterable, mesh, definitions: bool):
  """Metrics, counts [K] or [L, K], the first images and reconstructions.

  Process 0 adds roundtrip_error to the metrics of `evaluate_split`: the largest
  difference between decode(encode(x)) and the model's forward pass.
  """
  codes, shown = metrics.CodeDefinitions(), []

  def on_batch(batch, sums):
    codes.add(sums['counts'])
    if not shown:
      shown.extend(batch['image'][batch['mask']][: validation.GRID_IMAGES])

  options = {'prefixes': tuple(tokenizer.prefixes)}
  result, counts = validation.evaluate_split(
    validation.compile_eval_step(tokenizer.model, mesh, **options),
    sharding.replicate(tokenizer.variables, mesh),
    batches,
    mesh=mesh,
    on_batch=on_batch,
  )
  originals = reconstructions = np.asarray(shown)
  if jax.process_index() == 0:
    decoded = tokenizer.reconstruct(originals)
    reconstructions = np.asarray(metrics.to_uint8(decoded))
    images = prepare_images(originals)
    forward = jax.jit(tokenizer.model.apply)(tokenizer.variables, images)
    error = abs(tokenizer.reconstruct(images) - forward.reconstruction)
    error = np.asarray(error)  # NumPy's maximum keeps NaN; XLA's may not
    result |= {
      'roundtrip_error': float(np.max(error, initial=0.0)),
      'roundtrip_error_definition': 'max |decode(encode(x)) - forward pass| on '
      f'[-1, 1], {len(images)} images',
    }
  if definitions:
    result['definitions'] = codes.result()
  return result, counts, originals, reconstructions


def _draw(folder, curves, log, name, result, counts, originals, images):
  strip = metrics.reconstruction_grid(originals, images)
  Image.fromarray(strip).save(folder / 'samples.png')
  pictures = figures.reconstructions(originals, {name: images})
  usage = figures.code_usage({name: counts})
  drawings = {'reconstructions': pictures, 'code_usage': usage}
  if 'prefixes' in result:
    drawings['prefixes'] = figures.prefixes({name: result['prefixes']})
  if log.exists():
    drawings[curves] = figures.curves({'this run': [read_jsonl(log)]})
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
  """Checks a request; returns the folder to write to."""
  if split not in SPLITS:
    names = ', '.join(SPLITS)
    raise ValueError(f'split: expected one of {names}, got {split!r}')
  if (save_images or perceptual) and jax.process_count() > 1:
    raise ValueError(
      'save_images, perceptual: expected a single process, got '
      f'{jax.process_count()}; evaluate the checkpoint on one host'
    )
  if save_images:
    check_folder(save_images, 'save_images')
  if str(workdir).startswith(SHARED) and not output:
    raise ValueError(f'output: expected a folder for the results of {workdir}')
  folder = Path(output or Path(workdir) / 'evaluation')
  folder /= _input_name(images, split) if images else split
  check_folder(folder, is_ours=None if output else _is_evaluation)
  return folder


def _writing(folder: Path, output):
  """Locks the folder of the results, in the process that writes them."""
  if jax.process_index():
    return contextlib.nullcontext()
  advice = 'name another output' if output else 'start the same command again'
  return claim(folder, advice, is_ours=None if output else _is_evaluation)


def _input_name(images: str, split: str) -> str:
  """A name for the results of a split of an input: my_images-1a2b3c4d."""
  path = _whole(images)
  digest = hashlib.sha256(os.fsencode(f'{path} {split}')).hexdigest()
  stem = re.sub('[^0-9A-Za-z]+', '_', Path(path).stem)[:32]
  return f'{stem}-{digest[:8]}'


def _whole(images: str) -> str:
  """The same name for the same images, from any working directory."""
  path = Path(images).expanduser()
  return str(path.resolve()) if path.exists() else images


def _is_evaluation(folder: Path) -> bool:
  file = folder / 'metrics.json'
  return file.exists() and 'split' in (read_json(file) or {})


def _open_source(workdir, data, split, step, images, data_dir):
  """The images to measure, and their fields of metrics.json."""
  about = {'data': data.name, 'data_split': data.split, 'split': split}
  about |= {'chosen_on_these_images': False}
  about |= {'ssim_variant': metrics.SSIM_VARIANT}
  if images:
    splits = datasets.open_images(images, data_dir=data_dir or data.data_dir)
    split = 'all' if 'all' in splits else split
    if split not in splits:
      names = f'{", ".join(splits)} of {images}'
      raise ValueError(f'split: expected one of {names}, got {split}')
    about |= {'data': _whole(images), 'data_split': None, 'split': split}
    return splits[split], about
  shared = str(workdir).startswith(SHARED) or is_export(workdir)
  if shared and data.name.startswith((*KINDS, 'import:')):
    raise ValueError(
      'images: expected a folder or a data set: add --input, since an export '
      "does not name its run's images"
    )
  dataset = data.open_dataset(Path(workdir) / datasets.SPLIT_FILE, data_dir)
  if dataset.note:
    logging.info('%s', dataset.note)
  source = getattr(dataset, split)
  if step == 'best' and source is dataset.validation:
    about['chosen_on_these_images'] = True
    logging.warning(
      "validation chose 'best' on these images, so its numbers are too good; "
      'report the newest step or a held-out split'
    )
  return source, about
