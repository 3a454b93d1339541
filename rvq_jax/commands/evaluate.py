"""Evaluates a checkpoint: metrics as JSON and as a table, figures.

rvq evaluate --workdir=DIR [--split=test] [--step=N|best]
  [--input=IMAGE|FOLDER|tfds:NAME|photos] [--output=FOLDER] [--perceptual]

DIR is a run, an export or hf:OWNER/NAME; results go to DIR/evaluation/SPLIT, or
to FOLDER/SPLIT.
"""

from rvq_jax.commands import program
from rvq_jax.commands.program import SWITCH, Flag


@program.command(
  program.MODEL,
  program.STEP,
  program.DATA_DIR,
  Flag('split', 'train, validation or test.', 'test'),
  Flag('input', 'Your own images or data set; default: that of the run.'),
  Flag('output', 'New folder for the results.'),
  Flag('save_images', 'Folder for the images and reconstructions as PNG.'),
  Flag('perceptual', 'Also LPIPS, rFID ...; docs/guide.md.', False, SWITCH),
  Flag('definitions', 'Also usage as others define it.', False, SWITCH),
)
def main(flags):
  """Evaluates."""
  if not flags.workdir:
    program.fail('expected --workdir=DIR, the directory of a run')
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table
  from rvq_jax.metrics import format_definitions

  program.prepare_backend(flags, share_gpus=flags.perceptual)
  result = evaluate_run(
    flags.workdir,
    split=flags.split,
    step=flags.step,
    data_dir=flags.data_dir,
    images=flags.input,
    output=flags.output,
    save_images=flags.save_images,
    perceptual=flags.perceptual,
    definitions=flags.definitions,
  )
  measured = flags.input or f'{flags.split} split'
  print(format_table(result, f'{flags.workdir}, {measured}'))
  if flags.definitions:
    print(format_definitions(result['definitions']))
