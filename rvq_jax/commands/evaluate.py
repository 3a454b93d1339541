"""Evaluates a checkpoint: prints a table, writes metrics and figures.

rvq evaluate --workdir=DIR [--split=test] [--step=N|best]
  [--input=IMAGE|FOLDER|tfds:NAME|wds:PATTERN|...] [--output=FOLDER]
  [--perceptual]

It writes to DIR/evaluation/SPLIT or to FOLDER/SPLIT; with --input, SPLIT is a
name for the input.
"""

from rvq_jax.commands import program
from rvq_jax.commands.program import SWITCH, Flag


@program.command(
  *program.MODEL,
  program.DATA_DIR,
  Flag('split', 'train, validation or test.', 'test'),
  Flag('input', 'Your images or data set; default: the data of the run.'),
  Flag('output', 'New folder for the results.'),
  Flag('save_images', 'Folder for the images and reconstructions as PNG.'),
  Flag('perceptual', 'Add LPIPS and rFID, if installed.', False, SWITCH),
  Flag('definitions', 'Add usage by other definitions.', False, SWITCH),
)
def main(flags):
  """Evaluates."""
  if not flags.workdir:
    program.fail('expected --workdir=DIR, the directory of a run')
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table
  from rvq_jax.metrics import format_definitions

  program.prepare_backend(flags, share_gpus=flags.perceptual)
  options = dict(vars(flags))
  result = evaluate_run(images=options.pop('input'), **options)
  measured = flags.input or f'{flags.split} split'
  program.show(format_table(result, f'{flags.workdir}, {measured}'))
  if flags.definitions:
    program.show(format_definitions(result['definitions']))
