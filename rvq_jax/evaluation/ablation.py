"""The paper's tables as grids of runs (paper 4.2 and 4.3).

A cell is a method: what it changes in a config. Each cell and seed is an
ordinary run in its own directory, so a grid that was cut off goes on where it
was, and a finished run is not run again.
"""

import json
import logging
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.training import config as config_lib
from rvq_jax.training.loop import train

LOG_LINES = 20  # of a short run: points of its curves
METRICS = ('mse', 'psnr', 'usage', 'perplexity')


class Cell(NamedTuple):
  """A method.

  Attributes:
    label: its name in tables and figures.
    changes: config field -> value; all other fields stay.
  """

  label: str
  changes: dict[str, Any]


CELLS = {
  'rotation_ema': Cell('rotation, EMA', {}),
  'reflection_ema': Cell(
    'reflection (eq. 4), EMA', {'model.estimator': 'reflection'}
  ),
  'ste_ema': Cell('STE, EMA', {'model.estimator': 'ste'}),
  'rotation_learned': Cell('rotation, learned codes', {'model.ema': False}),
  'reflection_learned': Cell(
    'reflection (eq. 4), learned codes',
    {'model.estimator': 'reflection', 'model.ema': False},
  ),
  'ste_learned': Cell(
    'VQ-VAE (STE, learned codes)',
    {'model.estimator': 'ste', 'model.ema': False},
  ),
  'vqvae_ema': Cell(
    'VQ-VAE EMA (no replacement)',
    {
      'model.estimator': 'ste',
      'model.dead_code_threshold': 0.0,
      'model.init_from': 'normal',
    },
  ),
  'gumbel': Cell('Gumbel-softmax (dVAE)', {'model.quantizer': 'gumbel'}),
  'fsq': Cell('FSQ', {'model.quantizer': 'fsq'}),
  'simvq': Cell(
    'SimVQ', {'model.quantizer': 'simvq', 'model.estimator': 'ste'}
  ),
}


class Row(NamedTuple):
  """A line of a table.

  Attributes:
    cell: name in `CELLS`.
    paper: data set -> what the paper prints: {metric: number}.
  """

  cell: str
  paper: dict[str, dict[str, float]] = {}


class Table(NamedTuple):
  """A table of the paper.

  Attributes:
    title: what it compares.
    note: what a reader must know of the comparison.
    rows: its lines.
  """

  title: str
  note: str
  rows: tuple[Row, ...]


def _cifar10(mse, usage, perplexity=None):
  printed = {'mse': mse, 'usage': usage}
  if perplexity is not None:
    printed['perplexity'] = perplexity
  return {'cifar10': printed}


_TWICE = (
  'The paper prints the same two conditions in tables {0}; here the other '
  'factor is varied between them, so that both together are the whole grid.'
)
TABLES = {
  3: Table(
    'Methods',
    'The same K, and so the same bits an image, for all. The paper names one '
    'conventional VQ-VAE; the other baselines are ours.',
    (
      Row(
        'rotation_ema',
        _cifar10(0.0098, 0.968, 7950.4)
        | {'imagenet': {'mse': 0.0275, 'usage': 0.903, 'perplexity': 12345.6}},
      ),
      Row('ste_learned', _cifar10(0.0189, 0.783, 802.1)),
      Row('vqvae_ema'),
      Row('gumbel'),
      Row('fsq'),
      Row('simvq'),
    ),
  ),
  4: Table(
    'Rotation on and off, with EMA',
    _TWICE.format('4 and 6'),
    (
      Row('rotation_ema', _cifar10(0.0123, 0.925)),
      Row('reflection_ema'),
      Row('ste_ema', _cifar10(0.0189, 0.783)),
    ),
  ),
  5: Table(
    'EMA on and off, with rotation',
    _TWICE.format('5 and 7'),
    (
      Row('rotation_ema', _cifar10(0.0123, 0.925)),
      Row('rotation_learned', _cifar10(0.0145, 0.852)),
    ),
  ),
  6: Table(
    'Rotation on and off, with learned codes',
    _TWICE.format('4 and 6'),
    (
      Row('rotation_learned', _cifar10(0.0123, 0.925)),
      Row('reflection_learned'),
      Row('ste_learned', _cifar10(0.0189, 0.783)),
    ),
  ),
  7: Table(
    'EMA on and off, straight-through',
    _TWICE.format('5 and 7'),
    (
      Row('ste_ema', _cifar10(0.0123, 0.925)),
      Row('ste_learned', _cifar10(0.0145, 0.852)),
    ),
  ),
}


def cells_of(tables) -> list[str]:
  """The cells that some of the tables need, each once, in their order."""
  names = dict.fromkeys(row.cell for t in tables for row in TABLES[t].rows)
  return list(names)


def cell_config(config, cell: str, seed: int):
  """The config of one run.

  Args:
    config: ConfigDict that all cells share.
    cell: name in `CELLS`.
    seed: of the run.

  Returns:
    A ConfigDict; of a run that counts steps the temperature of 'gumbel' falls
    over all of them.
  """
  config = config.copy_and_resolve_references()
  for name, value in CELLS[cell].changes.items():
    section, _, field = name.rpartition('.')
    config[section][field] = value
  config.seed = seed
  if config.num_steps is not None:
    config.model.temperature_steps = config.num_steps
    config.log_every = max(1, config.num_steps // LOG_LINES)
  return config


def run_grid(config, workdir, *, cells, seeds: int) -> list[dict[str, Any]]:
  """Runs every cell with seeds 0 ... seeds - 1; finished runs are only read.

  Args:
    config: ConfigDict that all cells share.
    workdir: directory of the grid; a run is in CELL/seed_S.
    cells: names in `CELLS`.
    seeds: number of seeds.

  Returns:
    One record a run: cell, seed, workdir, seconds (None where the run was cut
    off in between) and the metrics of the test split.

  Raises:
    ValueError: a run in workdir was made with another config.
  """
  plan = [(cell, seed) for seed in range(seeds) for cell in cells]
  configs = [cell_config(config, cell, seed) for cell, seed in plan]
  folders = [Path(workdir) / cell / f'seed_{seed}' for cell, seed in plan]
  for folder, wanted in zip(folders, configs, strict=True):
    _check_same(folder, config_lib.check_config(wanted))
  records = []
  for i, (cell, seed) in enumerate(plan):
    where = f'run {i + 1} of {len(plan)}: {cell}, seed {seed}'
    if not (folders[i] / 'cell.json').exists():
      logging.info('%s', where)
      _run(configs[i], folders[i])
    else:
      logging.info('%s: finished before', where)
    record = json.loads((folders[i] / 'cell.json').read_text())
    records.append(
      {'cell': cell, 'seed': seed, 'workdir': str(folders[i])} | record
    )
  return records


def _check_same(folder, wanted):
  """Refuses a directory that holds a run of another config or length."""
  path = folder / 'config.json'
  if not path.exists():
    return
  found = json.loads(path.read_text())
  differ = [
    f'config.{name}: {found.get(name)!r} there, {wanted[name]!r} wanted'
    for name in wanted
    if found.get(name) != wanted[name] and name != 'data.data_dir'
  ]
  if differ:
    raise ValueError(
      f'{folder} holds a run of another config; use another --workdir: '
      + '; '.join(differ)
    )


def _run(config, folder):
  """Trains and evaluates one run; cell.json, written last, says it is done."""
  whole = not (folder / 'config.json').exists()
  start = time.time()
  train(config, folder)
  result = evaluate_run(folder)
  seconds = round(time.time() - start, 1) if whole else None
  text = json.dumps({'seconds': seconds, 'metrics': result}, indent=2)
  part = folder / 'cell.json.part'
  part.write_text(text + '\n')
  shutil.move(part, folder / 'cell.json')


def summarise(records) -> dict[str, dict[str, Any]]:
  """Mean and standard deviation over the seeds of each cell.

  Args:
    records: from `run_grid`.

  Returns:
    cell -> {'label', 'seeds', 'seconds' (mean, or None), 'bits_per_image',
    'entropy_bits_per_image', and for each of `METRICS` {'mean', 'std' (sample
    standard deviation; None for one seed), 'values'}}.
  """
  summary = {}
  for cell in dict.fromkeys(record['cell'] for record in records):
    own = [record for record in records if record['cell'] == cell]
    metrics = [record['metrics'] for record in own]
    seconds = [r['seconds'] for r in own if r['seconds'] is not None]
    row = {
      'label': CELLS[cell].label,
      'seeds': len(own),
      'seconds': statistics.mean(seconds) if seconds else None,
      'bits_per_image': metrics[0]['bits_per_image'],
      'entropy_bits_per_image': statistics.mean(
        m['tokens'] / m['images'] * m['entropy_bits'] for m in metrics
      ),
    }
    for name in METRICS:
      values = [m[name] for m in metrics]
      spread = statistics.stdev(values) if len(values) > 1 else None
      row[name] = {
        'mean': statistics.mean(values),
        'std': spread,
        'values': values,
      }
    summary[cell] = row
  return summary
