"""The paper's tables as grids of runs (paper 4.2 and 4.3), and objectives.

A cell is a method, as changes to a config. Each cell and seed is an ordinary
run in CELL/seed_S: a grid resumes, and only reads finished runs.
"""

import itertools
import json
import logging
from pathlib import Path

from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.evaluation.perceptual import load_metrics
from rvq_jax.io import check_folder, read_json, write_atomic
from rvq_jax.training import config as config_lib
from rvq_jax.training.checkpoints import is_run
from rvq_jax.training.loop import train

# The paper's method, for any config.
_PAPER = {
  'model.estimator': 'rotation',
  'model.quantize_after': 0,
  'model.dead_code_threshold': 0.9,
  'model.commitment_weight': 0.25,
}
_REFLECTION = _PAPER | {'model.estimator': 'reflection'}
_STE = _PAPER | {'model.estimator': 'ste'}
_EQ5, _EQ8 = {'model.loss_form': 'paper_eq5'}, {'model.loss_form': 'paper_eq8'}
_PLAIN = {'model.dead_code_threshold': 0.0, 'model.init_from': 'normal'}
_LEARNED = {'model.ema': False} | _PLAIN  # as in their papers
_LPIPS = {'objective.pixel': 'l1', 'objective.perceptual_weight': 1.0}
_NO_D = {'objective.adversarial_weight': 0.0}
_MSE = _NO_D | {
  'objective.pixel': 'mse',
  'objective.perceptual_weight': 0.0,
  'model.commitment_weight': 0.25,  # MSE has smaller gradients than LPIPS
}
# Name: label in tables and figures, config field -> value.
CELLS = {
  'rotation_ema': ('rotation, EMA', _PAPER),
  'reflection_ema': ('reflection (eq. 4), EMA', _REFLECTION),
  'ste_ema': ('STE, EMA', _STE),
  'rotation_learned': ('rotation, learned codes', _PAPER | _LEARNED),
  'reflection_learned': ('reflection, learned codes', _REFLECTION | _LEARNED),
  'ste_learned': ('VQ-VAE (STE, learned codes)', _STE | _LEARNED),
  'rotation_eq5': ('rotation, learned codes, eq. 5', _PAPER | _LEARNED | _EQ5),
  # Equation 8 gives codes no gradient: the EMA moves them.
  'rotation_eq8': ('rotation, EMA, eq. 8', _PAPER | _EQ8),
  'vqvae_ema': ('VQ-VAE EMA (no replacement)', _STE | _PLAIN),
  'gumbel': ('Gumbel-softmax (dVAE)', _PAPER | {'model.quantizer': 'gumbel'}),
  'fsq': ('FSQ', _PAPER | {'model.quantizer': 'fsq'}),
  'simvq': ('SimVQ', _STE | {'model.quantizer': 'simvq'}),
  'mse': ('MSE', _MSE),
  'perceptual': ('L1 + LPIPS', _LPIPS | _NO_D),
  'adversarial': ('L1 + LPIPS + discriminator', _LPIPS),
}

# Data set: the paper's MSE, usage and perplexity. Tables 4 and 6 print the same
# numbers, and so do 5 and 7. Here they differ in the other factor, so the four
# cover the whole grid.
_BOTH = {'cifar10': (0.0098, 0.968, 7950.4)}
_BOTH |= {'imagenet': (0.0275, 0.903, 12345.6)}
_NEITHER = {'cifar10': (0.0189, 0.783, 802.1)}
_ON, _NO_EMA = {'cifar10': (0.0123, 0.925)}, {'cifar10': (0.0145, 0.852)}
_NO_ROTATION = {'cifar10': (0.0189, 0.783)}
TITLES = {
  3: 'Methods (the paper names one conventional VQ-VAE; the others are ours)',
  4: 'Rotation on and off, with EMA',
  5: 'EMA on and off, with rotation',
  6: 'Rotation on and off, with learned codes; the losses as printed',
  7: 'EMA on and off, straight-through',
  'objectives': 'Objectives (not in the paper)',
}
TABLES = {
  3: {'rotation_ema': _BOTH, 'ste_learned': _NEITHER, 'vqvae_ema': {}}
  | {'gumbel': {}, 'fsq': {}, 'simvq': {}},
  4: {'rotation_ema': _ON, 'reflection_ema': {}, 'ste_ema': _NO_ROTATION},
  5: {'rotation_ema': _ON, 'rotation_learned': _NO_EMA},
  6: {'rotation_learned': _ON, 'reflection_learned': {}}
  | {'ste_learned': _NO_ROTATION, 'rotation_eq5': {}, 'rotation_eq8': {}},
  7: {'ste_ema': _ON, 'ste_learned': _NO_EMA},
  'objectives': {'mse': {}, 'perceptual': {}, 'adversarial': {}},
}
PAPER_TABLES = (3, 4, 5, 6, 7)


def cells_of(tables) -> list[str]:
  """The cells of tables in order, without repetition."""
  return list(dict.fromkeys(cell for table in tables for cell in TABLES[table]))


def cell_config(config, cell: str, seed: int):
  """A copy of a ConfigDict with the changes of a cell, for one run.

  With num_steps, the temperature of 'gumbel' falls over the whole run.
  """
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(CELLS[cell][1])
  config.seed = seed
  if config.num_steps is not None:
    config.model.temperature_steps = config.num_steps
    config.log_every = max(1, config.num_steps // 20)  # points of a curve
  return config


def run_grid(
  config, workdir, *, cells, seeds: int, perceptual: bool = False
) -> list[dict]:
  """Runs every cell of a ConfigDict with seeds 0 ... seeds - 1 in workdir.

  Returns one record per run: cell, seed, workdir and metrics of the test split,
  on request also perceptual ones.

  Raises:
    ValueError: workdir holds a run of another config or something other than
      a grid, or the config has no discriminator for the cell 'adversarial'.
    ImportError: `perceptual` finds no package to measure with.
  """
  if 'adversarial' in cells and not config.objective.adversarial_weight:
    raise ValueError(
      'config.objective.adversarial_weight: expected above 0, as in '
      'the config photos_vqgan, got 0'
    )
  if perceptual:
    load_metrics()  # before hours of training
  check_folder(workdir, '--workdir', _is_grid)
  runs = []
  for seed, cell in itertools.product(range(seeds), cells):
    changed = cell_config(config, cell, seed)
    folder = Path(workdir) / cell / f'seed_{seed}'
    check_folder(folder, '--workdir', is_run)
    _check_same(folder, config_lib.check_config(changed))
    runs.append({'cell': cell, 'seed': seed, 'workdir': str(folder)})
  for i, run in enumerate(runs, 1):
    cell, seed, folder = run['cell'], run['seed'], Path(run['workdir'])
    logging.info('run %d of %d: %s, seed %d', i, len(runs), cell, seed)
    result = folder / 'cell.json'
    if not result.exists():
      train(cell_config(config, cell, seed), folder)
      metrics = evaluate_run(folder, perceptual=perceptual)
      write_atomic(result, json.dumps(metrics, indent=2) + '\n')
    run['metrics'] = read_json(result)
    if run['metrics'] is None:
      raise ValueError(f'{result} is damaged; remove it to evaluate again')
  return runs


def _is_grid(folder) -> bool:
  """Whether a folder holds a run of a cell, or only cells."""
  runs = [path for cell in CELLS for path in folder.glob(f'{cell}/seed_*')]
  names = {path.name for path in folder.iterdir()}
  return any(map(is_run, runs)) or names <= {*CELLS}


def _check_same(folder, config):
  """Refuses a run of another config or length."""
  path = folder / 'config.json'
  saved = read_json(path) if path.exists() else config
  saved = config_lib.completed(saved, folder)
  differ = '; '.join(
    f'config.{name}: expected {value}, got {saved.get(name)}'
    for name, value in config.items()
    if saved.get(name) != value and name != 'data.data_dir'
  )
  if differ:
    raise ValueError(
      f'{folder} holds a run of another config; use another --workdir: {differ}'
    )
