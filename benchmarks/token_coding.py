"""How many bytes the ids of real images take in each coding.

python benchmarks/token_coding.py --workdir=DIR

Crops of scikit-image's photographs. Beside packing and LZMA stand codings that
rvq_jax does not use: the model's own code counts (an ideal arithmetic coder
with them), counts that adapt to the image from those on, and zlib.
"""

import argparse
import math
import zlib

import jax
import numpy as np
import skimage.data

from rvq_jax import load
from rvq_jax.tokens import packing
from rvq_jax.tokens.tiling import encode_images

_PHOTOGRAPHS = ('chelsea', 'astronaut', 'coffee', 'rocket')
_PRIOR = 200


def static_bits(ids, shares) -> float:
  """Bits of an ideal coder that knows how often the model used each code."""
  return -np.log2(shares[ids]).sum()


def adaptive_bits(ids, shares) -> float:
  """Bits of an ideal coder that starts there and counts along."""
  counts, total, bits = shares * _PRIOR, float(_PRIOR), 0.0
  for i in ids:
    bits -= math.log2(counts[i] / total)
    counts[i] += 1
    total += 1
  return bits


def measure(images, tokenizer, shares) -> dict[str, float]:
  """Bytes an image of each coding, the mean over images."""
  size, sums = tokenizer.codebook_size, {}
  dtype = packing.id_dtype(size)
  for image in images:
    ids = encode_images(tokenizer, image[None]).reshape(-1)
    found = {
      'packed': len(packing.pack(ids, size)),
      'static counts': static_bits(ids, shares) / 8,
      'adaptive counts': adaptive_bits(ids, shares) / 8,
      'zlib': len(zlib.compress(ids.astype(dtype).tobytes(), 9, wbits=-15)),
      'packed or LZMA': len(packing.compress(ids, size)[1]),
    }
    sums = {n: sums.get(n, 0) + value for n, value in found.items()}
  return {name: value / len(images) for name, value in sums.items()}


def main():
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, help='of an EMA run')
  tokenizer = load(parser.parse_args().workdir)
  paths = jax.tree_util.tree_leaves_with_path(tokenizer.variables['codebook'])
  (counts,) = (x for path, x in paths if 'cluster_size' in str(path))
  shares = np.asarray(counts, np.float64) + 0.05 * float(counts.mean())
  shares /= shares.sum()
  for side in (256, 128, 64):
    images = [
      photograph[y : y + side, x : x + side]
      for photograph in (getattr(skimage.data, n)() for n in _PHOTOGRAPHS)
      for y, x in ((0, 0), (40, 100), (100, 150))
    ]
    images = [image for image in images if image.shape[:2] == (side, side)]
    found = measure(images, tokenizer, shares)
    text = ', '.join(f'{n} {value:.0f}' for n, value in found.items())
    print(f'{len(images)} crops of {side} x {side}, bytes an image: {text}')


if __name__ == '__main__':
  main()
