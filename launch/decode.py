"""Turns tokens back into images.

python launch/decode.py --workdir=DIR photo.npz photo.png
python launch/decode.py --workdir=DIR --input=tokens/ --output=images/
  [--step=N|best]

DIR is the model that made the tokens, or one whose decoder alone was
fine-tuned: a run, an export or hf:OWNER/NAME.
"""

import io
from pathlib import Path

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'Saved step or best; default newest.')
_INPUT = flags.DEFINE_string('input', None, 'Folder of tokens.')
_OUTPUT = flags.DEFINE_string('output', None, 'New folder of images.')


def main(*paths):
  """Decodes a file or a folder of tokens."""
  if not _WORKDIR.value or bool(_INPUT.value and _OUTPUT.value) == bool(paths):
    command_line.fail(
      'expected --workdir=DIR and either FILE.npz IMAGE.png, or --input=FOLDER '
      'and --output=FOLDER'
    )
  step = command_line.parse_step(_STEP.value)
  decode_image(step, *paths) if paths else decode_folder(step)


def decode_image(step, source, output=''):
  """Writes one image."""
  command_line.check_output(output, '.png')
  from PIL import Image

  from rvq_jax.io import write_atomic
  from rvq_jax.tokenizer import tiling
  from rvq_jax.tokenizer.load import load

  command_line.prepare_backend()
  image = tiling.load_image(load(_WORKDIR.value, step), source)
  content = io.BytesIO()
  Image.fromarray(image).save(content, 'PNG')
  write_atomic(output, content.getvalue())
  print(f'{output}: {image.shape[1]} x {image.shape[0]} pixels')


def decode_folder(step):
  """Writes a folder of images, or one per split."""
  from rvq_jax.tokenizer import dataset
  from rvq_jax.tokenizer.load import load

  command_line.prepare_backend()
  source = Path(_INPUT.value)
  found = sorted(path.parent for path in source.glob(f'*/{dataset.META}'))
  tokenizer = load(_WORKDIR.value, step)
  for folder in found or [source]:
    to = Path(_OUTPUT.value) / folder.relative_to(source)
    count = dataset.decode_dataset(tokenizer, folder, to)
    print(f'{to}: {count} images')


if __name__ == '__main__':
  command_line.run(main, positional=2)
