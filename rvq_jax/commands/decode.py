"""Turns tokens back into images.

rvq decode --workdir=DIR photo.npz photo.png
rvq decode --workdir=DIR --input=tokens/ --output=images/

DIR is the model that made the tokens, or a copy with a fine-tuned decoder.
"""

import io
from pathlib import Path

from rvq_jax.commands import program
from rvq_jax.commands.program import Flag


@program.command(
  *program.MODEL,
  Flag('input', 'Folder of tokens.'),
  Flag('output', 'New folder for the images.'),
  paths=True,
)
def main(flags, *paths):
  """Decodes a file or a folder of tokens."""
  program.check_usage(flags, paths, 'FILE.npz IMAGE.png')
  _decode_image(flags, *paths) if paths else _decode_folder(flags)


def _decode_image(flags, source, output):
  from PIL import Image

  from rvq_jax.io import check_file, write_atomic
  from rvq_jax.tokenizer import tiling
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  check_file(output)
  image = tiling.load_image(load(flags.workdir, flags.step), source)
  content = io.BytesIO()
  Image.fromarray(image).save(content, 'PNG')
  write_atomic(output, content.getvalue())
  program.show(f'{output}: {image.shape[1]} x {image.shape[0]} pixels')


def _decode_folder(flags):
  from rvq_jax.io import check_folder
  from rvq_jax.tokenizer import dataset
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  source = Path(flags.input)
  splits = sorted(path.parent for path in source.glob(f'*/{dataset.META}'))
  folders = {
    folder: Path(flags.output) / folder.relative_to(source)
    for folder in splits or [source]
  }
  for output in folders.values():
    check_folder(output)
  tokenizer = load(flags.workdir, flags.step)
  for folder, output in folders.items():
    count = dataset.decode_dataset(tokenizer, folder, output)
    program.show(f'{output}: {count} images')
