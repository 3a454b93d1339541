"""What JPEG, WebP and AVIF make of an image in as many bytes."""

import numpy as np

from rvq_jax.evaluation.rate_distortion import codec_points

FORMATS = ('JPEG', 'WEBP', 'AVIF')
_HIGHEST = 95


def at_size(image: np.ndarray, size: int) -> list[dict]:
  """Measures each codec at the best quality that fits.

  Args:
    image: uint8 [h, w, 3].
    size: bytes that the file may have.

  Returns:
    A record of `codec_points` for each codec that Pillow can write: of the
    highest quality whose file is not larger than `size`, or of the lowest
    where even that is larger.
  """
  found = []
  for codec in FORMATS:
    best, low, high = _point(image, codec, 0), 0, _HIGHEST
    if best is None:
      continue
    while low < high and best['bits_per_image'] <= 8 * size:
      middle = (low + high + 1) // 2
      point = _point(image, codec, middle)
      if point['bits_per_image'] <= 8 * size:
        best, low = point, middle
      else:
        high = middle - 1
    found.append(best)
  return found


def _point(image, codec, quality):
  """The record of one quality; None where Pillow cannot write the codec."""
  points = codec_points(image[None], formats=(codec,), qualities=(quality,))
  return points[0] if points else None


def format_comparison(
  image: np.ndarray, reconstruction: np.ndarray, size: int
) -> str:
  """A table: bits a pixel and PSNR of the tokens and of each codec.

  Args:
    image: uint8 [h, w, 3].
    reconstruction: of its tokens, the same shape.
    size: bytes of the file that holds the tokens.

  Returns:
    Lines of aligned text.
  """
  pixels = image.shape[0] * image.shape[1]
  error = np.mean((image.astype(np.float64) - reconstruction) ** 2)
  psnr = 10 * np.log10(255**2 / max(error, 1 / image.size))
  lines = [f'{"":<9}{"bytes":>9}  bits/pixel  PSNR, dB']
  rows = [('.rvq', 8 * size, psnr, '')]
  for point in at_size(image, size):
    bits = point['bits_per_image']
    note = f'quality {point["quality"]}'
    note += ', its smallest file' if bits > 8 * size else ''
    rows.append((point['codec'], bits, point['psnr'], note))
  for name, bits, value, note in rows:
    line = f'{name:<9}{bits / 8:>9,.0f}{bits / pixels:>12.4f}{value:>10.2f}'
    lines.append(f'{line}  {note}'.rstrip())
  return '\n'.join(lines)
