"""Writes a trained model as a folder that others can load.

python launch/export.py --workdir=DIR --output=OUT [--step=N|best]
  [--name=NAME] [--license=apache-2.0] [--stablehlo]

OUT holds model.safetensors, config.json, README.md (a model card) and figures;
rvq_jax.load('OUT') opens it, its tokenizer_torch.py does in PyTorch. To put it
on the Hugging Face Hub: hf upload OWNER/NAME OUT, and then
rvq_jax.load('hf:OWNER/NAME'). --stablehlo adds encode and decode for JAX alone,
a file each for CPU and CUDA.
"""

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_OUTPUT = flags.DEFINE_string('output', None, 'New folder to write.')
_STEP = flags.DEFINE_string('step', None, 'Saved step or best; default newest.')
_NAME = flags.DEFINE_string('name', None, 'On the card; default: of the run.')
_LICENSE = flags.DEFINE_string(
  'license', 'unknown', 'Of the weights, as the Hub writes it: apache-2.0.'
)
_STABLEHLO = flags.DEFINE_bool(
  'stablehlo', False, 'Write encode and decode for JAX alone too.'
)


def main():
  """Exports."""
  if not _WORKDIR.value or not _OUTPUT.value:
    command_line.fail('expected --workdir=DIR and --output=FOLDER')
  step = command_line.parse_step(_STEP.value)
  from rvq_jax.tokenizer.export import export_run

  command_line.prepare_backend()
  folder = export_run(
    _WORKDIR.value,
    _OUTPUT.value,
    step=step,
    name=_NAME.value,
    license=_LICENSE.value,
    stablehlo=_STABLEHLO.value,
  )
  names = ', '.join(sorted(path.name for path in folder.iterdir()))
  print(f'{folder}: {names}')


if __name__ == '__main__':
  command_line.run(main)
