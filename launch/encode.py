"""Turns images into tokens.

python launch/encode.py --workdir=DIR photo.jpg photo.rvq
python launch/encode.py --workdir=DIR --input=FILE|FOLDER|tfds:NAME|photos
  --output=tokens/ [--split=train] [--image_size=N] [--shard_size=4096]
  [--step=N|best] [--data_dir=DIR]

DIR is a run, an exported model or hf:OWNER/NAME. One image becomes an .rvq
file, beside which JPEG, WebP and AVIF of the same size are measured; a data
set becomes token shards, and so does one image where the output is a folder.
The same command goes on where one was interrupted. A folder of yours that is
called photos goes before the embedded set; tfds:photos names that one.
"""

from pathlib import Path

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'A saved step, or best; the newest.')
_INPUT = flags.DEFINE_string('input', None, 'Image, folder or data set.')
_OUTPUT = flags.DEFINE_string('output', None, 'File.rvq, or folder of shards.')
_SPLIT = flags.DEFINE_string('split', None, 'One split; default: each.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Of prepared tfds data.')
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', None, 'Side to crop to; 0: as they are; default: as trained.'
)
_SHARD_SIZE = flags.DEFINE_integer('shard_size', 4096, 'Images a shard.')
_COMPARE = flags.DEFINE_bool('compare', True, 'Of one image: beside codecs.')


def main(*paths):
  """Encodes a file or a data set."""
  first, second = (*paths, None, None)[:2]
  source, output = _INPUT.value or first, _OUTPUT.value or second
  if not _WORKDIR.value or not source:
    command_line.fail('expected --workdir=DIR and an image or --input=FOLDER')
  step = command_line.parse_step(_STEP.value)
  path = Path(source).expanduser()
  named = source.startswith(('tfds:', 'folder:')) or source == 'photos'
  if not named and not path.exists():
    command_line.fail(
      f'there is no {source}: expected an image, a folder, tfds:NAME or photos'
    )
  one = path.is_file()
  output = output or (str(path.with_suffix('.rvq')) if one else None)
  if not output:
    command_line.fail('expected --output=FOLDER, got none')
  if one and not _is_folder(output):
    if not output.endswith('.rvq'):
      command_line.fail(
        f'expected --output=FILE.rvq, or FOLDER/ for token shards, got '
        f'{output!r}'
      )
  elif not one and output.endswith('.rvq') and not Path(output).is_dir():
    command_line.fail(
      f'expected --output=FOLDER for the tokens of a data set, got {output!r}'
    )
  from rvq_jax.evaluation.load import load
  from rvq_jax.tokens import encode, files
  from rvq_jax.tokens.inputs import open_input

  command_line.prepare_backend()
  if one and not _is_folder(output):
    tokenizer = load(_WORKDIR.value, step)
    print(
      files.encode_and_report(tokenizer, path, output, compare=_COMPARE.value)
    )
    return
  splits = open_input(source, _DATA_DIR.value, split=_SPLIT.value)
  tokenizer = load(_WORKDIR.value, step)
  for split, images in splits.items():
    to = Path(output) / ('' if list(splits) == ['all'] else split)
    card = encode.encode_dataset(
      tokenizer,
      images,
      to,
      about={'input': source, 'split': split},
      image_size=encode.side(tokenizer, _IMAGE_SIZE.value),
      shard_size=_SHARD_SIZE.value,
    )
    print(f'{split}: {card["images"]} images as tokens, in {to}')


def _is_folder(output):
  """Whether a path means a folder, which need not be there yet."""
  path = Path(output)
  return output.endswith('/') or path.is_dir() or not path.suffix


if __name__ == '__main__':
  command_line.run(main, positional=2)
