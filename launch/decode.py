"""Turns tokens back into images.

python launch/decode.py --workdir=DIR photo.rvq photo.png
python launch/decode.py --workdir=DIR --input=tokens/ --output=images/
  [--format=png|webp] [--step=N|best]

DIR is the model that made the tokens: a run, an export or hf:OWNER/NAME.
PNG and WebP are written without loss.
"""

from pathlib import Path

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'A saved step, or best; the newest.')
_INPUT = flags.DEFINE_string('input', None, 'File.rvq, or folder of shards.')
_OUTPUT = flags.DEFINE_string('output', None, 'Image, or folder of images.')
_FORMAT = flags.DEFINE_string('format', 'png', 'Of a folder: png or webp.')


def main(*paths):
  """Decodes a file or a folder of shards."""
  first, second = (*paths, None, None)[:2]
  source, output = _INPUT.value or first, _OUTPUT.value or second
  if not _WORKDIR.value or not source:
    command_line.fail('expected --workdir=DIR and FILE.rvq or --input=FOLDER')
  step = command_line.parse_step(_STEP.value)
  folder = Path(source).is_dir()
  if not output and folder:
    command_line.fail('expected --output=FOLDER for the images')
  from rvq_jax.evaluation.load import load
  from rvq_jax.tokens import decode, files
  from rvq_jax.tokens.card import token_folders

  command_line.prepare_backend()
  if folder:
    found = token_folders(source)
    tokenizer = load(_WORKDIR.value, step)
    for tokens in found:
      to = Path(output) / tokens.relative_to(source)
      count = decode.decode_dataset(
        tokenizer, tokens, to, extension=f'.{_FORMAT.value}'
      )
      print(f'{count} images in {to}')
    return
  output = output or str(Path(source).with_suffix('.png'))
  files.check_format(Path(output).suffix)
  image = files.decode_file(load(_WORKDIR.value, step), source)
  files.write_image(output, image)
  print(f'{output}: {image.shape[1]} x {image.shape[0]} pixels')


if __name__ == '__main__':
  command_line.run(main, positional=2)
