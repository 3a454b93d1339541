"""Trains a tokenizer, evaluates it on the test split and draws the figures.

python launch/main.py --config=configs/photos.py [--workdir=DIR]
  [--config.model.codebook_size=8192 ...]

The run lives in DIR (default: runs/NAME). The same command goes on with a run
that was interrupted.
"""

from pathlib import Path

import command_line
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Config file, as configs/cifar10.py or :f4 behind it.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; default runs/NAME of the config.'
)


def main():
  """Trains, evaluates, draws."""
  flag = flags.FLAGS['config']
  given = config_flags.get_config_filename(flag) if flag.present else ''
  path, _, variant = given.partition(':')
  if not Path(path).is_file():
    got = f', got {path}' if path else ''
    command_line.fail(
      'expected --config=configs/NAME.py; there are '
      + ', '.join(sorted(map(str, Path('configs').glob('*.py'))))
      + got
    )
  # Imported once the flags are known to be good: this takes seconds.
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table
  from rvq_jax.training.loop import train

  name = Path(path).stem + (f'_{variant}' if variant else '')
  workdir = Path(_WORKDIR.value or Path('runs') / name)
  train(_CONFIG.value, workdir)
  result = evaluate_run(workdir)
  print(format_table(result, f'{name}, test split'))
  print(f'metrics, figures and checkpoints are in {workdir}')


if __name__ == '__main__':
  command_line.run(main)
