"""Trains a tokenizer, evaluates it on the test split and draws the figures.

python launch/main.py --config=configs/photos.py [--workdir=DIR]
  [--config.model.codebook_size=8192 ...]

The run lives in DIR (default: runs/NAME). The same command resumes a run that
was interrupted. --multihost makes one run of all processes that were started
with this command (docs/scale.md); all must see DIR.
"""

from pathlib import Path

import command_line
import processes
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
  processes.prepare_backend()
  from rvq_jax.training.loop import train

  workdir = Path(_WORKDIR.value or Path('runs') / name)
  train(_CONFIG.value, workdir)
  # Not before: matplotlib looks for fonts, which takes a second when it is new.
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table

  result = evaluate_run(workdir)
  if command_line.is_first():
    print(format_table(result, f'{name}, test split'))
    print(f'metrics, figures and checkpoints are in {workdir}')


if __name__ == '__main__':
  command_line.run(main)
