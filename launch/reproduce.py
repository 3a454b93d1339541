"""Runs the paper's tables 3 to 7 and writes them as Markdown and JSON.

python launch/reproduce.py --config=configs/cifar10.py
  [--table=3|4|5|6|7|all|objectives] [--seeds=3] [--num_steps=N]
  [--workdir=DIR] [--config.data.data_dir=DIR ...]

Each method and seed is an ordinary run in DIR/CELL/seed_S. The same command
resumes a grid that was interrupted; finished runs are only read. The
report is DIR/report/report.md. Default DIR: runs/reproduce_NAME.

--table=objectives, which is not in the paper and not in `all`, sets MSE, L1
with LPIPS, and these with a discriminator side by side; it needs the extra
`perceptual`.
"""

import shlex
import sys
from pathlib import Path

import command_line
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='A name, as cifar10:f4, or a config file; all methods share it.',
)
_TABLE = flags.DEFINE_string('table', 'all', '3, 4, 5, 6, 7, all, objectives.')
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs of each method.')
_NUM_STEPS = flags.DEFINE_integer(
  'num_steps', None, 'Steps of each run; default: those of the config.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the grid; default runs/reproduce_NAME.'
)


def main():
  """Runs the grid, evaluates, writes the report."""
  name = command_line.config_name(flags.FLAGS['config'])
  if _TABLE.value not in ('all', 'objectives', *'34567'):
    command_line.fail(
      f'--table: expected 3 to 7, all or objectives, got {_TABLE.value!r}'
    )
  if _SEEDS.value < 1:
    command_line.fail(f'--seeds: expected at least 1, got {_SEEDS.value}')
  # Imported once the flags are known to be good: this takes seconds.
  from rvq_jax.paper import ablation, report

  command_line.prepare_backend()
  config, tables = _CONFIG.value, ablation.PAPER_TABLES
  if _NUM_STEPS.value is not None:
    config.num_steps = _NUM_STEPS.value
  objectives = _TABLE.value == 'objectives'
  if objectives:
    tables = ('objectives',)
  elif _TABLE.value != 'all':
    tables = (int(_TABLE.value),)
  workdir = Path(_WORKDIR.value or Path('runs') / f'reproduce_{name}')
  cells = ablation.cells_of(tables)
  records = ablation.run_grid(
    config, workdir, cells=cells, seeds=_SEEDS.value, perceptual=objectives
  )
  command = shlex.join(['python', 'launch/reproduce.py', *sys.argv[1:]])
  text = report.write_report(
    config, workdir, records, tables=tables, command=command
  )
  print(text)
  print(f'the report is {workdir / "report" / "report.md"}')


if __name__ == '__main__':
  command_line.run(main)
