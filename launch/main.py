"""Trains a tokenizer, evaluates it on the test split and draws the figures.

python launch/main.py --config=configs/photos.py [--workdir=DIR]
  [--config.model.codebook_size=8192 ...]

The run lives in DIR (default: runs/NAME). The same command resumes a run that
was interrupted. --multihost makes one run of all processes that were started
with this command (docs/scale.md); all must see DIR.
"""

import logging
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
_MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Several processes, found through the scheduler.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, without a scheduler.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With the above.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'This one, from 0.')
_LOST_AFTER = flags.DEFINE_integer(
  'lost_after', 100, 'Seconds of silence after which a process is lost.'
)


def main():
  """Trains, evaluates, draws."""
  name = command_line.config_name(flags.FLAGS['config'])
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if given != (None, None, None) and not _MULTIHOST.value:
    command_line.fail('--coordinator and the like: expected --multihost too')
  # Imported once the flags are known to be good: this takes seconds.
  command_line.prepare_backend()
  if _MULTIHOST.value:
    from rvq_jax.training import multihost

    multihost.initialize(*given, lost_after=_LOST_AFTER.value)
    if not command_line.is_first():
      logging.getLogger().setLevel(logging.WARNING)
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
