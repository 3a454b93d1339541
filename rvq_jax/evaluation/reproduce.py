"""From a config to the paper's tables: runs, rates, figures, report."""

import datetime
import logging
from pathlib import Path

import numpy as np

from rvq_jax.data import datasets, loaders
from rvq_jax.evaluation import (
  ablation,
  comparison,
  provenance,
  rate_distortion,
  report,
)
from rvq_jax.evaluation.rate_figure import rate_figure

CODEC_IMAGES = 256
CURVE_POINTS = 60
CURVE_PIXELS = 20_000 * 32**2  # of the training split, for the covariance


def reproduce(
  config, workdir, *, tables=(3, 4, 5, 6, 7), seeds: int = 1, command: str = ''
) -> str:
  """Runs the cells of some tables and writes WORKDIR/report.

  Args:
    config: ConfigDict that all methods share.
    workdir: directory of the grid.
    tables: numbers of the paper's tables.
    seeds: runs of each method.
    command: how this was called, for the report.

  Returns:
    The tables as Markdown.

  Raises:
    ValueError: see `ablation.run_grid`.
  """
  workdir = Path(workdir)
  # The seeds of a method share their programs: compile each once.
  records = ablation.run_grid(
    config, workdir, cells=ablation.cells_of(tables), seeds=seeds
  )
  summary = ablation.summarise(records)
  about = _about(config, command, seeds, records)
  rates, bound = _rate_distortion(config, summary)
  bits = records[0]['metrics']['bits_per_image']
  about['Gaussian curve'] = (
    f'MSE {float(bound.mse([bits])[0]):.4f} at {bits:g} bits: rate-distortion '
    f'function of a Gaussian source with the covariance of {bound.images:,} '
    f'training images, in tiles of {bound.patch} x {bound.patch}'
  )
  figures = _figures(config, records, summary, rates)
  report.write(
    workdir / 'report',
    title="The paper's tables, measured",
    about=about,
    tables=tables,
    summary=summary,
    records=records,
    figures=figures,
  )
  return report.markdown(tables, summary, about)


def _about(config, command, seeds, records):
  """What stands above the tables."""
  first = records[0]['metrics']
  seconds = [r['seconds'] for r in records if r['seconds'] is not None]
  length = (
    f'{config.num_steps} steps'
    if config.num_steps
    else f'{config.num_epochs} epochs'
  )
  spread = 'mean ± sample standard deviation' if seeds > 1 else 'no spread'
  about = {
    'command': command,
    'data': config.data.name,
    'split': f'{config.data.split}; measured on {first["images"]:,} test images'
    f' of {config.data.image_size} x {config.data.image_size}',
    'each run': f'{length} of batch {config.batch_size}, K = '
    f'{config.model.codebook_size:,}, {first["bits_per_image"]:g} bits an image'
    ', for every method',
    'seeds': f'{seeds}, {spread}',
    'scale': 'MSE on [-1, 1]; usage and perplexity over the whole test split; '
    'perplexity: higher is more even',
    'hardware': provenance.hardware(),
    'versions': provenance.versions('jax', 'flax', 'optax'),
    'date': datetime.date.today().isoformat(),
  }
  if seconds:
    about['time'] = (
      f'{np.median(seconds):.0f} s a run (median, with compilation and '
      f'evaluation), {sum(seconds) / 60:.0f} min in all'
    )
  return about


def _figures(config, records, summary, rates):
  """The figures of the report, in its order."""
  labels = {cell: row['label'] for cell, row in summary.items()}
  return [
    (
      'rate_distortion',
      'Rate and distortion',
      'Filled: tokens at log2 K bits each. Hollow: at the entropy of the code '
      'frequencies. The curve is that of a Gaussian source with the covariance '
      'of the training split; codecs are measured with their headers.',
      rates,
      False,
    ),
    (
      'reconstructions',
      'Reconstructions',
      'The first test images, what each method (seed 0) makes of them, and '
      f'{comparison.ERROR_GAIN} x the absolute error.',
      comparison.reconstructions(records, labels),
      True,
    ),
    (
      'usage',
      'Codebook usage',
      'How often each code is chosen over the test split (seed 0).',
      comparison.usage(records, labels),
      False,
    ),
    (
      'loss',
      'Training loss',
      'Mean over the seeds; the band is from the least to the greatest.',
      comparison.curves(
        records, labels, 'train/mse', 'MSE on [-1, 1]', log=True
      ),
      False,
    ),
    (
      'perplexity',
      'Perplexity over training',
      f'Over the tokens of {config.log_every} steps.',
      comparison.curves(records, labels, 'train/perplexity', 'perplexity'),
      False,
    ),
  ]


def _rate_distortion(config, summary):
  """The methods among the Gaussian curve and the codecs; and that curve."""
  logging.info('rate-distortion curve of the training split')
  dataset = datasets.open_dataset(
    config.data.name, split=config.data.split, data_dir=config.data.data_dir
  )

  def batches(source):
    return loaders.eval_batches(
      source, batch_size=256, image_size=config.data.image_size
    )

  size = config.data.image_size
  bound = rate_distortion.gaussian_bound(
    batches(dataset.train),
    image_size=size,
    max_images=max(1000, CURVE_PIXELS // size**2),  # minutes, not hours
  )
  batch = next(batches(dataset.test))
  images = batch['image'][batch['mask']][:CODEC_IMAGES]
  codecs = rate_distortion.codec_points(images)
  palette = comparison.colours(summary)
  points = [
    {
      'label': row['label'],
      'colour': palette[cell],
      'bits': row['bits_per_image'],
      'entropy_bits': row['entropy_bits_per_image'],
      'mse': row['mse']['mean'],
      'mse_std': row['mse']['std'],
    }
    for cell, row in summary.items()
  ]
  low = min(point['entropy_bits'] for point in points) / 4
  high = max(codec['bits_per_image'] for codec in codecs)
  bits = np.geomspace(max(low, 1.0), high, CURVE_POINTS)
  drawn = rate_figure(
    curve_bits=bits,
    curve_mse=bound.mse(bits),
    codecs=codecs,
    points=points,
    title='',
  )
  return drawn, bound
