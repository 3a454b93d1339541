"""Evaluation over a whole split, from sums."""

import contextlib
import json
import logging
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax import metrics
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import to_float
from rvq_jax.evaluation import figures
from rvq_jax.evaluation.load import load
from rvq_jax.evaluation.perceptual import (
  ImageFolders,
  import_packages,
  perceptual_metrics,
)
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.metrics import CodeDefinitions, to_uint8
from rvq_jax.training import config as config_lib
from rvq_jax.training import sharding
from rvq_jax.training.validation import (
  UNITS,
  evaluate_split,
  make_eval_step,
)

SPLITS = ('train', 'validation', 'test')
SHOWN_IMAGES = 8


def format_table(result: dict, title: str) -> str:
  """The metrics as lines of aligned text: name, value, meaning."""
  lines = [title]
  for name, value in result.items():
    if not isinstance(value, int | float):
      continue
    if isinstance(value, int):
      text = f'{value:,}'
    elif name == 'usage':
      text = f'{value:.2%}'
    else:
      text = f'{value:,.4f}' if abs(value) < 100 else f'{value:,.1f}'
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
  perceptual: bool = False,
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
    save_images: folder for the whole split and its reconstructions as PNG
      files; see `ImageFolders`.
    perceptual: adds rFID, IS and LPIPS; see `perceptual_metrics`.
    definitions: adds usage and perplexity as others define them; see
      `CodeDefinitions`.

  Returns:
    The metrics named in `UNITS`; those of `perceptual_metrics` where asked for;
    and under 'definitions' those of `CodeDefinitions`.

  Raises:
    ValueError: the split is unknown, the data is not there, or save_images
      holds the images of another run.
    FileNotFoundError: there is no such run or step.
    ImportError: `perceptual` needs a package that is missing.
  """
  _check(split, save_images, perceptual)
  tokenizer = load(workdir, step)
  about = {
    'step': tokenizer.step,
    'data': tokenizer.config['data.name'],
    'data_split': tokenizer.config['data.split'],
    'split': split,
  }
  with contextlib.ExitStack() as stack:
    if perceptual and not save_images:
      save_images = stack.enter_context(tempfile.TemporaryDirectory())
    folders = None
    if save_images:
      folders = _image_folders(save_images, about, workdir, tokenizer)
    seen = _Seen(tokenizer, folders)
    result, counts = _run(tokenizer, split, data_dir, seen)
    if folders:
      folders.close()
    if perceptual:
      result |= perceptual_metrics(folders.folder)
  if definitions:
    result['definitions'] = seen.codes.result()
  if jax.process_index() == 0:
    _write(Path(workdir), tokenizer, about, result, counts, seen.originals)
  return result


def _check(split, save_images, perceptual):
  if split not in SPLITS:
    raise ValueError(
      f'split: expected one of {", ".join(SPLITS)}; got {split!r}'
    )
  if perceptual:
    import_packages()
  if (save_images or perceptual) and jax.process_count() > 1:
    raise ValueError(
      'save_images, perceptual: expected a single process, got '
      f'{jax.process_count()}; evaluate the checkpoint on one host'
    )


def _image_folders(folder, about, workdir, tokenizer):
  images = {
    'run': str(Path(workdir).resolve()),
    'image_size': tokenizer.config['data.image_size'],
    'crop': 'scaled and centre-cropped',
    'range': 'uint8, 0 to 255',
    'rounding': 'round((clip(x, -1, 1) + 1) * 127.5) of the reconstructions',
    'names': 'position in the split; images that cannot be read are left out',
  }
  return ImageFolders(folder, about | images)


class _Seen:
  """What a pass over a split leaves besides its sums."""

  def __init__(self, tokenizer: Tokenizer, folders: ImageFolders | None):
    self._tokenizer, self._folders = tokenizer, folders
    self.codes = CodeDefinitions()
    self.originals = np.zeros((0, 0, 0, 3), np.uint8)

  def __call__(self, batch, sums):
    self.codes.add(sums['counts'])
    if not len(self.originals):
      self.originals = batch['image'][batch['mask']][:SHOWN_IMAGES]
    if self._folders:
      images = self._tokenizer.reconstruct(batch['image'])
      self._folders.add(
        batch['image'], np.asarray(to_uint8(images)), batch['mask']
      )


def _run(tokenizer, split, data_dir, seen):
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
  return evaluate_split(
    eval_step,
    sharding.replicate(tokenizer.variables, mesh),
    batches,
    mesh=mesh,
    on_batch=seen,
  )


def _write(workdir, tokenizer, about, result, counts, originals):
  folder = workdir / 'evaluation' / about['split']
  folder.mkdir(parents=True, exist_ok=True)
  about = about | {'ssim_variant': metrics.SSIM_VARIANT}
  text = json.dumps(about | result, indent=2)
  (folder / 'metrics.json').write_text(text + '\n')
  images = tokenizer.reconstruct(originals)
  made = np.asarray(to_uint8(images))
  strip = metrics.reconstruction_grid(originals, made)
  Image.fromarray(strip).save(folder / 'samples.png')
  figures.save_reconstructions(
    folder / 'reconstructions.png',
    originals,
    made,
    np.asarray(metrics.psnr(images, to_float(originals))),
  )
  np.save(folder / 'code_counts.npy', counts, allow_pickle=False)
  figures.save_code_usage(folder / 'code_usage.png', counts)
  if (workdir / 'metrics.jsonl').exists():
    figures.save_curves(workdir / 'evaluation' / 'curves.png', workdir)
