"""Trains a tokenizer, evaluates it on the test split and draws the figures.

python launch/main.py --config=photos [--workdir=DIR]
  [--init=EXPORT|RUN|hf:NAME] [--config.model.codebook_size=8192 ...]

A config is a name, as cifar10 or cifar10:f4, or the path of a file of yours.
The run lives in DIR (default: runs/NAME). The same command resumes a run that
was interrupted. --init starts a new run from the parameters and codes of a
trained model (docs/guide.md). --multihost makes one run of all processes that
were started with this command (docs/scale.md); all must see DIR.
"""

import functools
from pathlib import Path

import command_line
import processes
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='A name, as cifar10:f4, or the path of a config file.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; default runs/NAME of the config.'
)
_INIT = flags.DEFINE_string(
  'init', None, 'Run, export or hf:NAME whose parameters a new run starts from.'
)


def main():
  """Trains, evaluates, draws."""
  name = command_line.config_name(flags.FLAGS['config'])
  # Imported once the flags are known to be good: this takes seconds.
  processes.prepare_backend()
  from rvq_jax.training.loop import train

  workdir = Path(_WORKDIR.value or Path('runs') / name)
  source = _INIT.value
  if source and Path(source).resolve() == workdir.resolve():
    command_line.fail(
      f'--init: expected another folder than --workdir={workdir}'
    )
  init = functools.partial(_load, source) if source else None
  train(_CONFIG.value, workdir, init=init)
  # Not before: matplotlib looks for fonts, which takes a second when it is new.
  from rvq_jax.evaluation.evaluate import evaluate_run, format_table

  result = evaluate_run(workdir)
  if command_line.is_first():
    print(format_table(result, f'{workdir}, test split'))
    print(summary(result, workdir))


def summary(result, workdir) -> str:
  """Three lines: what was made, where the picture is, what to type next."""
  tokens, images = result['tokens'], result['images']
  bits = result['bits_per_image'] * images / tokens
  pictures = workdir / 'evaluation' / 'test' / 'reconstructions.png'
  here = Path('launch/explore.py').exists()  # else: installed
  command = 'python launch/explore.py' if here else 'rvq explore'
  return (
    f'made: a tokenizer, {tokens / images:,.0f} tokens of {bits:g} bits an '
    f'image, PSNR {result["psnr"]:.2f} dB on {images:,} test images\n'
    f'look: {pictures}\n'
    f'next: {command} --workdir={workdir} --output={workdir.name}.html'
  )


def _load(source):
  from rvq_jax.tokenizer.load import load

  return load(source)


if __name__ == '__main__':
  command_line.run(main)
