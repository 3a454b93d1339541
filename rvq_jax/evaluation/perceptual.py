"""A split as image files, and what networks say of them: rFID, IS and LPIPS.

The numbers are those of torch-fidelity and lpips, which most others use, on
PNG files that any other tool can read as well. Both packages are the optional
extra `eval`, and nothing here is imported before it is asked for.
"""

import contextlib
import http.client
import importlib
import importlib.metadata
import json
import logging
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ORIGINALS, RECONSTRUCTIONS = 'originals', 'reconstructions'
_BATCH = 32
_IS_SPLITS = 10
_LPIPS_SIDE = 31  # AlexNet's second pooling has no input below
_INCEPTION_WEIGHTS = (
  'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
  'weights-inception-2015-12-05-6726825d.pth'
)
_ALEXNET_WEIGHTS = (
  'https://download.pytorch.org/models/alexnet-owt-7be5be79.pth'
)


class ImageFolders:
  """Writes FOLDER/{originals,reconstructions}/NNNNNN.png and about.json.

  NNNNNN is the image's position in the split, so that an image that cannot be
  read leaves a gap. about.json says what the files are; its count is null until
  all are written.

  Args:
    folder: where to write; made where it is missing.
    about: what the images are, as JSON values. A folder with the images of the
      same `about` is written anew.

  Raises:
    ValueError: the folder cannot be made, or holds the images of another run.
  """

  def __init__(self, folder, about: dict):
    self.folder = Path(folder)
    self._about = dict(about)
    self._position = self._count = 0
    names = (ORIGINALS, RECONSTRUCTIONS)
    found = [p for n in names for p in (self.folder / n).glob('*.png')]
    if found and self._stored() != self._about:
      raise ValueError(
        f'save_images: expected a folder without images of another run, found '
        f'{min(found)}; name another folder, or remove it'
      )
    for path in found:
      path.unlink()
    try:
      for name in names:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
      self._write_about(None)
    except OSError as error:
      raise ValueError(
        f'save_images: cannot write to {self.folder}: {error.strerror}'
      ) from error

  def _stored(self):
    try:
      stored = json.loads((self.folder / 'about.json').read_text())
    except (OSError, ValueError):
      return None
    return {n: v for n, v in stored.items() if n != 'count'}

  def _write_about(self, count):
    text = json.dumps(self._about | {'count': count}, indent=2)
    (self.folder / 'about.json').write_text(text + '\n')

  def add(self, originals, reconstructions, mask) -> None:
    """Writes the images of the next batch that count.

    Args:
      originals: uint8 [B, h, w, 3].
      reconstructions: uint8 [B, h, w, 3].
      mask: bool [B].
    """
    rows = np.flatnonzero(mask)

    def write(row):
      name = f'{self._position + row:06d}.png'
      for folder, images in (
        (ORIGINALS, originals),
        (RECONSTRUCTIONS, reconstructions),
      ):
        path = self.folder / folder / name
        Image.fromarray(images[row]).save(path, compress_level=1)

    with ThreadPoolExecutor() as pool:
      list(pool.map(write, rows))
    self._position += len(mask)
    self._count += len(rows)

  def close(self) -> None:
    """Completes about.json with the number of images."""
    self._write_about(self._count)


def import_packages():
  """The packages of the extra `eval`.

  Returns:
    torch, torch_fidelity and lpips.

  Raises:
    ImportError: one of them is missing; says how to install them.
  """
  names = ('torch', 'torch_fidelity', 'lpips')
  try:
    return tuple(importlib.import_module(name) for name in names)
  except ImportError as error:
    raise ImportError(
      'rFID, IS and LPIPS need torch-fidelity and lpips: pip install '
      f'"rvq_jax[eval]" ({error})'
    ) from error


def perceptual_metrics(folder) -> dict[str, float | str]:
  """rFID, Inception Score and LPIPS of the images in a folder.

  rFID is the Frechet distance of Heusel et al. 2017 between the originals and
  the reconstructions; the Inception Score (Salimans et al. 2016) is that of the
  reconstructions; LPIPS is that of Zhang et al. 2018. They need weights, which
  are downloaded once. A metric that cannot be computed is left out with a
  warning, never given as 0.

  Args:
    folder: as `ImageFolders` writes it.

  Returns:
    Of rfid, inception_score, inception_score_std and lpips those that could be
    computed, each with NAME_definition, a line.

  Raises:
    ImportError: a package is missing; says how to install them.
    ValueError: the folders do not hold the same images.
  """
  torch, torch_fidelity, lpips = import_packages()
  folder = Path(folder)
  names = _names(folder)
  result = {}
  for metric, weights, measure, package in (
    ('rfid, inception_score', _INCEPTION_WEIGHTS, _inception, torch_fidelity),
    ('lpips', _ALEXNET_WEIGHTS, _lpips, lpips),
  ):
    try:
      result |= measure(torch, package, folder, names)
    except _TooFewError as error:
      logging.warning('%s left out: %s', metric, error)
    except Exception as error:
      if not _is_download(error):
        raise
      logging.warning(
        '%s left out: the weights could not be fetched (%s); put %s into %s',
        metric,
        ' '.join(str(error).split()) or type(error).__name__,
        weights,
        Path(torch.hub.get_dir()) / 'checkpoints',
      )
  return result


class _TooFewError(Exception):
  """The images are too few or too small for a metric."""


def _is_download(error) -> bool:
  """Whether it is what `torch.hub` raises where weights cannot be had.

  urllib's errors, time-outs, resets and a disk that is full or read-only are
  OSErrors; a reply cut short is an HTTPException; a download that is not the
  file, as a proxy's page, has another hash.
  """
  return isinstance(error, OSError | http.client.HTTPException) or (
    isinstance(error, RuntimeError) and 'invalid hash' in str(error)
  )


def _names(folder):
  originals, reconstructions = (
    sorted(path.name for path in (folder / name).glob('*.png'))
    for name in (ORIGINALS, RECONSTRUCTIONS)
  )
  if originals != reconstructions or not originals:
    raise ValueError(
      f'expected the same images in originals and reconstructions of {folder}, '
      f'got {len(originals)} and {len(reconstructions)}'
    )
  return originals


def _inception(torch, torch_fidelity, folder, names):
  count = len(names)
  if count < _IS_SPLITS:
    raise _TooFewError(f'expected at least {_IS_SPLITS} images, got {count}')
  values = torch_fidelity.calculate_metrics(
    input1=str(folder / RECONSTRUCTIONS),
    input2=str(folder / ORIGINALS),
    cuda=torch.cuda.is_available(),
    fid=True,
    isc=True,
    isc_splits=_IS_SPLITS,
    batch_size=_BATCH,
    samples_find_ext='png',
    # Loads images in this process: JAX's threads do not survive a fork.
    save_cpu_ram=True,
    cache=False,
    verbose=False,
  )
  source = (
    f'torch-fidelity {importlib.metadata.version("torch-fidelity")}, '
    'InceptionV3 (TensorFlow weights of 2015-12-05), PNG uint8'
  )
  score = f'of {count:,} reconstructions over {_IS_SPLITS} splits: {source}'
  return _with_definitions(
    rfid=(
      values['frechet_inception_distance'],
      f'lower is better: {source}, {count:,} reconstructions, reference: the '
      f'{count:,} originals of this split after the same crop',
    ),
    inception_score=(
      values['inception_score_mean'],
      f'higher is better, mean {score}',
    ),
    inception_score_std=(
      values['inception_score_std'],
      f'standard deviation {score}',
    ),
  )


def _lpips(torch, lpips, folder, names):
  with Image.open(folder / ORIGINALS / names[0]) as image:
    side = min(image.size)
  if side < _LPIPS_SIDE:
    raise _TooFewError(
      f'expected images of at least {_LPIPS_SIDE} pixels a side, got {side}'
    )
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  # The package calls torchvision as it was in 2021, and prints its download.
  with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
    warnings.filterwarnings('ignore', module='torchvision')
    model = lpips.LPIPS(net='alex', verbose=False).to(device)

  def read(kind, names):
    images = [np.asarray(Image.open(folder / kind / name)) for name in names]
    images = np.moveaxis(np.stack(images), 3, 1).astype(np.float32) / 127.5 - 1
    return torch.as_tensor(images, device=device)

  total = 0.0
  with torch.inference_mode():
    for start in range(0, len(names), _BATCH):
      some = names[start : start + _BATCH]
      distances = model(read(ORIGINALS, some), read(RECONSTRUCTIONS, some))
      total += float(distances.sum())
  definition = (
    f'lower is better: lpips {importlib.metadata.version("lpips")}, AlexNet, '
    f'weights v0.1, PNG uint8, mean over {len(names):,} pairs at their own size'
  )
  return _with_definitions(lpips=(total / len(names), definition))


def _with_definitions(**values):
  """{NAME: number, NAME_definition: line} of the numbers that are finite."""
  result = {}
  for name, (value, definition) in values.items():
    if math.isfinite(value):
      result |= {name: float(value), f'{name}_definition': definition}
    else:
      logging.warning('%s left out: it is %s', name, value)
  return result
