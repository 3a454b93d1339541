"""Turns tokens back into images.

rvq decode --workdir=DIR photo.npz photo.png
rvq decode --workdir=DIR --input=tokens/ --output=images/

DIR is the model that made the tokens, or one of which only the decoder was
fine-tuned: a run, an export or hf:OWNER/NAME.
"""

import io
from pathlib import Path

from rvq_jax.commands import program
from rvq_jax.commands.program import Flag


@program.command(
  program.MODEL,
  program.STEP,
  Flag('input', 'Folder of tokens.'),
  Flag('output', 'New folder of images.'),
  paths=2,
)
def main(flags, *paths):
  """Decodes a file or a folder of tokens."""
  program.check_usage(flags, paths, 'FILE.npz IMAGE.png')
  _decode_image(flags, *paths) if paths else _decode_folder(flags)


def _decode_image(flags, source, output=''):
  program.check_new_file(output, '.png')
  from PIL import Image

  from rvq_jax.io import write_atomic
  from rvq_jax.tokenizer import tiling
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  image = tiling.load_image(load(flags.workdir, flags.step), source)
  content = io.BytesIO()
  Image.fromarray(image).save(content, 'PNG')
  write_atomic(output, content.getvalue())
  print(f'{output}: {image.shape[1]} x {image.shape[0]} pixels')


def _decode_folder(flags):
  """Writes a folder of images, or one per split."""
  from rvq_jax.tokenizer import dataset
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  source = Path(flags.input)
  splits = sorted(path.parent for path in source.glob(f'*/{dataset.META}'))
  tokenizer = load(flags.workdir, flags.step)
  for folder in splits or [source]:
    output = Path(flags.output) / folder.relative_to(source)
    count = dataset.decode_dataset(tokenizer, folder, output)
    print(f'{output}: {count} images')
