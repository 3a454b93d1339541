"""Trains a tokenizer, evaluates it on the test split and draws the figures.

rvq train --config=photos [--config.model.codebook_size=8192 ...]

The same command resumes an interrupted run. --init fine-tunes a trained model.
--multihost shares a run among processes.
"""

import shlex
from pathlib import Path

from rvq_jax.commands import program
from rvq_jax.commands.program import Flag


@program.command(
  program.CONFIG,
  Flag('workdir', "Directory of the run; default: runs/, the config's name."),
  Flag('init', 'Run, export or hf:OWNER/NAME: the start of a new run.'),
  *program.PROCESSES,
)
def main(flags):
  """Trains, evaluates, draws."""
  workdir = Path(flags.workdir or Path('runs') / flags.run_name)
  if flags.init and Path(flags.init).resolve() == workdir.resolve():
    program.fail(f'--init: expected a folder other than --workdir={workdir}')
  program.prepare_backend(flags)
  from rvq_jax.tokenizer.load import load
  from rvq_jax.training.loop import train

  init = (lambda: load(flags.init)) if flags.init else None
  train(flags.config, workdir, init=init)
  # Import late: a new matplotlib searches fonts for a second.
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table

  result = evaluate_run(workdir)
  if program.is_first():
    program.show(format_table(result, f'{workdir}, test split'))
    program.show(_summary(result, workdir))


def _summary(result, workdir):
  """Three lines: the tokenizer, its picture, the next command."""
  tokens, images = result['tokens'], result['images']
  bits = result['bits_per_image'] * images / tokens
  page = f'{workdir.resolve().name or "explore"}.html'
  look = workdir / 'evaluation/test/reconstructions.png'
  arguments = shlex.join([f'--workdir={workdir}', f'--output={page}'])
  return (
    f'made: a tokenizer, {tokens / images:,.0f} tokens of {bits:g} bits per '
    f'image, PSNR {result["psnr"]:.2f} dB on {images:,} test images\n'
    f'look: {look}\n'
    f'next: rvq explore {arguments}'
  )
