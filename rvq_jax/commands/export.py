"""Writes a trained model as a folder that others can load.

rvq export --workdir=DIR --output=OUT [--name=NAME] [--license=apache-2.0]

OUT holds model.safetensors, config.json, README.md (a model card) and figures;
rvq_jax.load('OUT') opens it in JAX, its tokenizer_torch.py in PyTorch. To put
it on the Hugging Face Hub: hf upload OWNER/NAME OUT, and then
rvq_jax.load('hf:OWNER/NAME').
"""

from rvq_jax.commands import program
from rvq_jax.commands.program import SWITCH, Flag


@program.command(
  Flag('workdir', 'Directory of the run.'),
  program.STEP,
  Flag('output', 'New folder to write.'),
  Flag('name', 'On the card; default: of the run.'),
  Flag('license', 'Of the weights, as the Hub writes it.', 'unknown'),
  Flag(
    'stablehlo',
    'Also write encode and decode for JAX without this package, a file each '
    'for CPU and CUDA; the CUDA files have not run on a GPU yet.',
    False,
    SWITCH,
  ),
)
def main(flags):
  """Exports."""
  if not flags.workdir or not flags.output:
    program.fail('expected --workdir=DIR and --output=FOLDER')
  from rvq_jax.tokenizer.export import export_run

  program.prepare_backend(flags)
  folder = export_run(
    flags.workdir,
    flags.output,
    step=flags.step,
    name=flags.name,
    license=flags.license,
    stablehlo=flags.stablehlo,
  )
  names = ', '.join(sorted(path.name for path in folder.iterdir()))
  print(f'{folder}: {names}')
