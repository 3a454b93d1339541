"""Draws photographs, their tokens, and the images decoded from these tokens.

python examples/tokens.py --output=FILE.jpg [--workdir=pretrained:tiny_f4]
  [--width=1200]

The photographs come with scikit-image and matplotlib. A token has the colour of
its code: three principal components of the codebook as red, green and blue.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from rvq_jax import load
from rvq_jax.data.photos import photograph
from rvq_jax.metrics import psnr, to_uint8

GAP, SIDE = 6, 64
CROPS = {  # left, top, side
  'astronaut': (130, 0, 220),
  'chelsea': (110, 0, 290),
  'coffee': (130, 10, 380),
  'rocket': (190, 90, 330),
  'grace_hopper': (90, 10, 380),
  'astronaut, all': (0, 0, 512),
}


def crop(name):
  """The square uint8 [SIDE, SIDE, 3] of a photograph."""
  left, top, side = CROPS[name]
  image = Image.fromarray(photograph(name.partition(',')[0]))
  box = (left, top, left + side, top + side)
  return np.asarray(image.resize((SIDE, SIDE), Image.LANCZOS, box=box))


def colours(codes):
  """A colour per code: uint8 [K, 3] of codes [K, D], D of 3 or more."""
  centred = codes - np.mean(codes, 0)
  _, axes = np.linalg.eigh(centred.T @ centred)
  parts = centred @ axes[:, :-4:-1]
  ranks = np.argsort(np.argsort(parts, 0), 0)  # even use of each channel
  return np.uint8(30 + 210 * ranks / len(codes))


def main():
  """Writes the picture and prints the mean PSNR."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', required=True)
  parser.add_argument('--workdir', default='pretrained:tiny_f4')
  parser.add_argument('--width', type=int, default=1200)
  args = parser.parse_args()
  if Path(args.output).exists():
    raise SystemExit(f'error: {args.output} exists; give another --output')
  tokenizer = load(args.workdir)
  images = np.stack([crop(name) for name in CROPS])
  ids = np.asarray(tokenizer.encode(images))
  decoded = np.asarray(to_uint8(tokenizer.decode(ids)))
  tokens = colours(np.asarray(tokenizer.codebooks()[0]))[ids]
  each = (args.width + GAP) // len(CROPS) - GAP
  page = Image.new('RGB', (args.width, 3 * (each + GAP) - GAP), 'white')
  for row, kind in enumerate((images, tokens, decoded)):
    how = Image.NEAREST if kind is tokens else Image.BICUBIC
    for column, image in enumerate(kind):
      large = Image.fromarray(image).resize((each, each), how)
      page.paste(large, (column * (each + GAP), row * (each + GAP)))
  page.save(args.output, quality=90)
  mean = np.mean(psnr(images, decoded))
  print(f'{ids[0].size} tokens per image, PSNR {mean:.2f} dB')


if __name__ == '__main__':
  main()
