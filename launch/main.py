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
  name = command_line.config_name(flags.FLAGS['config'])
  # Imported once the flags are known to be good: this takes seconds.
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table
  from rvq_jax.training.loop import train

  workdir = Path(_WORKDIR.value or Path('runs') / name)
  train(_CONFIG.value, workdir)
  result = evaluate_run(workdir)
  print(format_table(result, f'{name}, test split'))
  print(f'metrics, figures and checkpoints are in {workdir}')


if __name__ == '__main__':
  command_line.run(main)
