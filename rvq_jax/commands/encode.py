"""Turns images into tokens.

rvq encode --workdir=DIR photo.jpg photo.npz
rvq encode --workdir=DIR --input=FOLDER|tfds:NAME|photos --output=tokens/

It turns an image of any size into an .npz file, each split of a data set into a
folder; wds:PATTERN, parquet:PATTERN and hf:OWNER/NAME are data sets, too. The
same command resumes an interrupted set. --multihost shares it among processes.
"""

from pathlib import Path

from rvq_jax.commands import program
from rvq_jax.commands.program import COUNT, Flag


@program.command(
  *program.MODEL,
  program.DATA_DIR,
  Flag('input', 'Folder of images, or data set.'),
  Flag('output', 'Folder for the tokens.'),
  Flag('split', 'Only this split; default: all splits.'),
  Flag(
    'image_size', 'Pixels, up to 8192; default: as in training.', None, COUNT
  ),
  *program.PROCESSES,
  paths=True,
)
def main(flags, *paths):
  """Encodes an image or a data set."""
  program.check_usage(flags, paths, 'IMAGE FILE.npz')
  _encode_image(flags, *paths) if paths else _encode_data_set(flags)


def _encode_image(flags, source, output):
  if not Path(source).is_file():
    program.fail(f'expected an image file, got {source}')
  from rvq_jax import metrics
  from rvq_jax.data.transforms import decode_image
  from rvq_jax.io import check_file
  from rvq_jax.tokenizer import tiling
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  check_file(output)
  image = decode_image(Path(source).read_bytes(), name=source)
  tokenizer = load(flags.workdir, flags.step)
  ids = tiling.save_image(tokenizer, image, output)
  decoded = tiling.decode_ids(tokenizer, ids[None], *image.shape[:2])
  psnr = metrics.psnr(image[None] / 127.5 - 1, decoded / 127.5 - 1)[0]
  bits = ids.size * (tokenizer.codebook_size - 1).bit_length()
  program.show(
    f'{output}: {image.shape[1]} x {image.shape[0]} pixels, {ids.size} tokens, '
    f'{bits * 3 / image.size:.4f} bits per pixel, PSNR {psnr:.2f} dB'
  )


def _encode_data_set(flags):
  program.prepare_backend(flags)
  from rvq_jax.data.datasets import check_apart, full_name, open_images
  from rvq_jax.tokenizer.encoding import check_output, encode_dataset
  from rvq_jax.tokenizer.load import load

  check_apart(full_name(flags.input), flags.output, '--output')
  splits = open_images(flags.input, data_dir=flags.data_dir, split=flags.split)
  folders = {
    split: Path(flags.output) / ('' if list(splits) == ['all'] else split)
    for split in splits
  }
  for folder in folders.values():
    check_output(folder)
  tokenizer = load(flags.workdir, flags.step)
  for split, folder in folders.items():
    about = {'input': flags.input, 'split': split, 'model': flags.workdir}
    meta = encode_dataset(
      tokenizer, splits[split], folder, image_size=flags.image_size, about=about
    )
    count, skipped = meta['num_images'], len(meta['skipped'])
    if program.is_first():
      text = f'tokens for {count} images, {skipped} skipped'
      program.show(f'{folder}: {text}')
