"""Evaluates a checkpoint: metrics as JSON and as a table, figures.

python launch/evaluate.py --workdir=DIR [--split=test] [--step=N|best]
  [--input=IMAGE|FOLDER|tfds:NAME|photos] [--output=FOLDER] [--data_dir=DIR]
  [--save_images=DIR] [--perceptual] [--definitions]

DIR is a run, an export or hf:OWNER/NAME; results go to DIR/evaluation/SPLIT, or
to FOLDER/SPLIT.
"""

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_SPLIT = flags.DEFINE_string('split', 'test', 'train, validation or test.')
_STEP = flags.DEFINE_string('step', None, 'Saved step or best; default newest.')
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where the data set is now; default: where it was.'
)
_INPUT = flags.DEFINE_string(
  'input', None, 'Your own images or data set, instead of that of the run.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'New folder for the results; default: DIR/evaluation.'
)
_SAVE_IMAGES = flags.DEFINE_string(
  'save_images', None, 'Write the split and its reconstructions as PNG files.'
)
_PERCEPTUAL = flags.DEFINE_bool(
  'perceptual', False, 'Also LPIPS, rFID and the like; see docs/guide.md.'
)
_DEFINITIONS = flags.DEFINE_bool(
  'definitions', False, 'Also usage and perplexity as others define them.'
)


def main():
  """Evaluates."""
  if not _WORKDIR.value:
    command_line.fail('expected --workdir=DIR, the directory of a run')
  step = command_line.parse_step(_STEP.value)
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table
  from rvq_jax.metrics import format_definitions

  command_line.prepare_backend(share_gpus=_PERCEPTUAL.value)
  result = evaluate_run(
    _WORKDIR.value,
    split=_SPLIT.value,
    step=step,
    data_dir=_DATA_DIR.value,
    images=_INPUT.value,
    output=_OUTPUT.value,
    save_images=_SAVE_IMAGES.value,
    perceptual=_PERCEPTUAL.value,
    definitions=_DEFINITIONS.value,
  )
  what = _INPUT.value or f'{_SPLIT.value} split'
  print(format_table(result, f'{_WORKDIR.value}, {what}'))
  if _DEFINITIONS.value:
    print(format_definitions(result['definitions']))


if __name__ == '__main__':
  command_line.run(main)
