"""Draws photographs beside their reconstructions and JPEG at the same bits.

python examples/photographs.py --images=FOLDER --output=FILE.jpg
  [--tokenizers=pretrained:tiny_f4,pretrained:tiny_f8] [--size=384x256]
  [--count=8] [--width=1200]

It crops photographs of at least this size, in the order of their names. Each
tokenizer has two columns: its reconstruction, and the largest JPEG file within
the same bits, or else the smallest. It prints the mean PSNR and bits per pixel;
a JPEG counts with its header.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rvq_jax import load, metrics
from rvq_jax.data.transforms import decode_image
from rvq_jax.tokenizer.tiling import decode_ids, encode_images

GAP, LABEL = 4, 24


def read(folder, size, count):
  """The first images of a folder that can be cropped to size, uint8."""
  width, height = size
  photographs = []
  for path in sorted(Path(folder).rglob('*')):
    if path.is_file() and len(photographs) < count:
      image = decode_image(path.read_bytes(), name=path)
      top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
      if min(top, left) >= 0:
        photographs.append(image[top : top + height, left : left + width])
  if len(photographs) < count:
    raise SystemExit(
      f'error: expected {count} images of {width}x{height} or more in {folder}'
      f', got {len(photographs)}; give another --size or --count'
    )
  return np.stack(photographs)


def tokenized(tokenizer, images):
  """Reconstructions, and the bits of one image's tokens."""
  ids = encode_images(tokenizer, images)
  bits = ids[0].size * np.log2(tokenizer.codebook_size)
  return decode_ids(tokenizer, ids, *images.shape[1:3]), bits


def jpeg(image, bits):
  """The best JPEG within `bits`, or else the smallest, and its bits."""
  best = None
  for quality in range(1, 96):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, 'jpeg', quality=quality, optimize=True)
    if best and 8 * len(stream.getvalue()) > bits:
      break
    best = stream
  return np.asarray(Image.open(best)), 8 * len(best.getvalue())


def draw(columns, width):
  """Columns {label: uint8 [count, h, w, 3]} as one picture."""
  count, height, side = next(iter(columns.values())).shape[:3]
  each = (width - GAP * (len(columns) - 1)) // len(columns)
  tall = round(each * height / side)
  page = Image.new('RGB', (width, LABEL + count * (tall + GAP)), 'white')
  font = ImageFont.load_default(15)
  for i, (label, images) in enumerate(columns.items()):
    left = i * (each + GAP)
    ImageDraw.Draw(page).text((left + 2, 3), label, 'black', font)
    for j, image in enumerate(images):
      small = Image.fromarray(image).resize((each, tall), Image.LANCZOS)
      page.paste(small, (left, LABEL + j * (tall + GAP)))
  return page


def main():
  """Prints the table and writes the picture."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--images', required=True)
  parser.add_argument('--output', required=True)
  shipped = 'pretrained:tiny_f4,pretrained:tiny_f8'
  parser.add_argument('--tokenizers', default=shipped)
  parser.add_argument('--size', default='384x256')
  parser.add_argument('--count', type=int, default=8)
  parser.add_argument('--width', type=int, default=1200)
  args = parser.parse_args()
  images = read(args.images, map(int, args.size.split('x')), args.count)
  columns, pixels = {'original': images}, images[0, ..., 0].size
  for name in args.tokenizers.split(','):
    tokenizer = load(name)
    decoded, bits = tokenized(tokenizer, images)
    files = [jpeg(image, bits) for image in images]
    short = f'f{tokenizer.factor}, {bits / pixels:.2f} bits per pixel'
    columns[short] = decoded
    rate = np.mean([x for _, x in files]) / pixels
    columns[f'JPEG, {rate:.2f}'] = np.stack([x for x, _ in files])
  for label in list(columns)[1:]:
    psnr = metrics.psnr(images, columns[label])
    print(f'{label}: PSNR {np.mean(psnr):.2f} dB')
  if Path(args.output).exists():
    raise SystemExit(f'error: {args.output} exists; give another --output')
  draw(columns, args.width).save(args.output, quality=60)


if __name__ == '__main__':
  main()
