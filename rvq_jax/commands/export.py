"""Writes a trained model as a folder that others can load.

rvq export --workdir=DIR --output=OUT [--name=NAME] [--license=apache-2.0]
  [--float16]
rvq export --workdir=DIR --output=OUT --layout=diffusers|original

rvq_jax.load('OUT') opens it in JAX, its tokenizer_torch.py in PyTorch. After
`hf upload OWNER/NAME OUT`, rvq_jax.load('hf:OWNER/NAME') opens it anywhere.
"""

from rvq_jax.commands import program
from rvq_jax.commands.program import LICENSE, SWITCH, Flag


@program.command(
  Flag('workdir', 'Directory of the run.'),
  program.STEP,
  Flag('output', 'New folder to write.'),
  Flag('name', 'Name on the card; default: name of the run.'),
  LICENSE,
  Flag('stablehlo', 'Add programs that need only JAX.', False, SWITCH),
  Flag('float16', 'Round the weights: half the size.', False, SWITCH),
  Flag('layout', 'diffusers or original: write only weights, in that layout.'),
)
def main(flags):
  """Exports."""
  if not flags.workdir or not flags.output:
    program.fail('expected --workdir=DIR and --output=FOLDER')
  from rvq_jax.tokenizer.export import export_run

  program.prepare_backend(flags)
  folder = export_run(**vars(flags))
  names = ', '.join(sorted(path.name for path in folder.iterdir()))
  program.show(f'{folder}: {names}')
