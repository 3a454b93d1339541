"""Turns images into tokens.

python launch/encode.py --workdir=DIR photo.jpg photo.npz
python launch/encode.py --workdir=DIR --input=FOLDER|tfds:NAME|photos
  --output=tokens/ [--split=train] [--image_size=N] [--step=N] [--data_dir=DIR]

DIR is a run, an export or hf:OWNER/NAME. An image of any size becomes an .npz
file, each split of a data set a folder. The same command resumes a data set;
--multihost shares it among processes, as launch/main.py does a run.
"""

from pathlib import Path

import command_line
import processes
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'Saved step or best; default newest.')
_INPUT = flags.DEFINE_string('input', None, 'Folder or data set.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the tokens.')
_SPLIT = flags.DEFINE_string('split', None, 'One split; default: each.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Of prepared tfds data.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', None, 'Pixels of a side.', 1)


def main(*paths):
  """Encodes an image or a data set."""
  if not _WORKDIR.value or bool(_INPUT.value and _OUTPUT.value) == bool(paths):
    usage = 'IMAGE FILE.npz, or --input=FOLDER and --output=FOLDER'
    command_line.fail(f'expected --workdir=DIR and either {usage}')
  step = command_line.parse_step(_STEP.value)
  encode_image(step, *paths) if paths else encode_data_set(step, _INPUT.value)


def encode_image(step, source, output=''):
  """Writes one .npz file."""
  command_line.check_output(output, '.npz')
  if not Path(source).is_file():
    command_line.fail(f'expected an image file, got {source}')
  from rvq_jax import metrics
  from rvq_jax.data.transforms import decode_image
  from rvq_jax.tokenizer import tiling
  from rvq_jax.tokenizer.load import load

  command_line.prepare_backend()
  image = decode_image(Path(source).read_bytes(), name=source)
  tokenizer = load(_WORKDIR.value, step)
  ids = tiling.save_image(tokenizer, image, output)
  made = tiling.decode_ids(tokenizer, ids[None], *image.shape[:2])
  psnr = metrics.psnr(image[None] / 127.5 - 1, made / 127.5 - 1)[0]
  bits = ids.size * (tokenizer.codebook_size - 1).bit_length()
  print(
    f'{output}: {made.shape[2]} x {made.shape[1]} pixels, {ids.size} tokens, '
    f'{bits * 3 / image.size:.4f} bits per pixel, PSNR {psnr:.2f} dB'
  )


def encode_data_set(step, name):
  """Writes one folder of tokens per split."""
  from rvq_jax.data.datasets import open_images
  from rvq_jax.tokenizer.encoding import encode_dataset
  from rvq_jax.tokenizer.load import load

  processes.prepare_backend()
  splits = open_images(name, data_dir=_DATA_DIR.value, split=_SPLIT.value)
  tokenizer = load(_WORKDIR.value, step)
  for split, images in splits.items():
    folder = Path(_OUTPUT.value) / ('' if list(splits) == ['all'] else split)
    about = {'input': name, 'split': split, 'model': _WORKDIR.value}
    meta = encode_dataset(
      tokenizer, images, folder, image_size=_IMAGE_SIZE.value, about=about
    )
    count, skipped = meta['num_images'], len(meta['skipped'])
    if command_line.is_first():
      print(f'{folder}: tokens of {count} images, {skipped} of them skipped')


if __name__ == '__main__':
  command_line.run(main, positional=2)
