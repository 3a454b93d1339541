"""Measures how fast a config trains, or a tokenizer encodes and decodes.

rvq benchmark CONFIG [--config.FIELD=VALUE ...] [--steps=50] [--profile]
rvq benchmark RUN|EXPORT|pretrained:NAME|hf:OWNER/NAME [--batch_size=N]

Images are random and lie on the device. It prints a table and, per row, a line
of JSON: time, operations by XLA's count and their share of the device's peak,
memory, power.
"""

import json
import re
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rvq_jax.commands import config_file, program
from rvq_jax.commands.program import COUNT, NUMBER, SWITCH, Flag

# Fields of the config in the command, without paths of this machine.
_CHANGED = r'^--?(no)?config[.](?!data[.](?:name|data_dir))(.*)$'
_COLUMNS = (
  *('what', 'hardware', 'images', 'ms', 'images/s', 'tokens/s', 'TFLOP'),
  *('TFLOP/s', 'of peak', 'GB', 'W', 'compile, s', 'versions'),
)


@program.command(
  program.CONFIG,
  *program.MODEL,
  Flag('steps', 'Steps or batches to time.', 50, COUNT),
  Flag('batch_size', 'Images; default: as in the config.', None, COUNT),
  Flag('peak', 'TFLOP/s of a device without a known peak.', None, NUMBER),
  Flag('profile', 'Also list the ten slowest kernels.', False, SWITCH),
  paths=True,
)
def main(flags, *paths):
  """Measures and prints."""
  from rvq_jax.io import SHARED

  models = [*filter(None, [flags.workdir]), *paths]
  there = [x for x in models if x.startswith(SHARED) or Path(x).is_dir()]
  given = ([flags.run_name] if flags.config else []) + models
  if len(given) != 1 or models != there:
    program.fail(
      f'expected one of {", ".join(config_file.MODULES)}, the path of a config '
      'file, the folder of a run or an export, pretrained:NAME or '
      'hf:OWNER/NAME, got ' + (' and '.join(given) or 'none')
    )
  if flags.peak is not None and not 0 < flags.peak < 1e6:
    program.fail(f'--peak: expected TFLOP/s, such as 989, got {flags.peak}')
  _prepare(flags)
  from jax.errors import JaxRuntimeError

  try:
    _measure(flags, *models)
  except JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).splitlines()[0]
    program.fail(f'expected a --batch_size that fits into memory; {reason}')


def _prepare(flags):
  """Prepares JAX; disables its cache, to time compilation."""
  program.prepare_backend(flags)
  import jax

  jax.config.update('jax_enable_compilation_cache', False)
  platforms = jax.config.jax_platforms
  if platforms and 'cpu' not in platforms:  # the CPU counts the operations
    jax.config.update('jax_platforms', f'{platforms},cpu')


def _measure(flags, model=None):
  from rvq_jax.evaluation import speed
  from rvq_jax.tokenizer.load import load

  if model:
    name = Path(model).resolve().name if Path(model).is_dir() else model
    programs = speed.code_programs(load(model, flags.step), flags.batch_size)
  else:
    if flags.batch_size:
      flags.config.batch_size = flags.batch_size
    typed = re.findall(_CHANGED, '\n'.join(shlex.split(flags.command)), re.M)
    name = ' '.join([flags.run_name, *map(''.join, typed)])
    programs = [speed.train_program(flags.config)]
  _show_row(_COLUMNS)
  _show_row(['---'] * len(_COLUMNS))
  about, more = {'name': name, 'commit': commit()}, []
  for x in programs:
    record = about | speed.measure(x, flags.steps, flags.peak)
    _show_row(_cells(record))
    more.append((record, speed.kernels(x) if flags.profile else []))
  for record, _ in more:
    program.show(json.dumps(record))
  for record, kernels in more:
    _show_kernels(record['what'], kernels)


def commit() -> str:
  """The commit of this checkout, -dirty if changed; else the version."""
  root = Path(__file__).resolve().parents[2]
  if (root / '.git').exists() and shutil.which('git'):
    command = 'describe --always --dirty --exclude=* --abbrev=10'.split()
    done = subprocess.run(
      ['git', '-C', str(root), *command], capture_output=True, text=True
    )
    if text := done.stdout.strip():
      return text
  try:
    return version('rvq_jax')
  except PackageNotFoundError:
    return 'unknown commit'


def _cells(record) -> list[str]:
  def number(name):
    x = record[name]
    if x is None:
      return '-'
    return f'{x:,.0f}' if x >= 1000 else f'{x:.3g}'

  side, share = record['image_size'], '-'
  if record['share_of_peak'] is not None:
    peak = f'{number("peak_TFLOP_per_s")} ({record["peak_of"]})'
    share = f'{record["share_of_peak"]:.1%} of {peak}'
  hardware = record['hardware']
  if record['driver']:
    hardware += f', driver {record["driver"]}'
  return [
    f'{record["name"]}: {record["what"]}',
    hardware,
    f'{side}x{side}, {record["batch_size"]}, {record["dtype"]}',
    *map(number, ('ms', 'images_per_s', 'tokens_per_s')),
    *(number('TFLOP'), number('TFLOP_per_s'), share),
    *map(number, ('memory_GB', 'watts', 'compile_s')),
    f'jax {record["jax"]}, {record["commit"]}',
  ]


def _show_row(cells):
  program.show(f'| {" | ".join(cells)} |')


def _show_kernels(what, kernels):
  if kernels:
    program.show(f'\n{what}, the slowest kernels per call\n')
    _show_row(('ms', 'share', 'calls', 'kernel', 'of'))
    _show_row(['---'] * 5)
  for x in kernels:
    numbers = f'{x["ms"]:.3g}', f'{x["share"]:.1%}', f'{x["calls"]:g}'
    _show_row((*numbers, x['kernel'][:60], x['of']))
