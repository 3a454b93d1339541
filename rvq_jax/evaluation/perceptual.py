"""A split as PNG files, and what networks say of them: rFID, IS and LPIPS.

Computed by torch-fidelity and lpips, the extra `eval`, imported when asked for.
"""

import importlib
import importlib.metadata
import logging
import math
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ('originals', 'reconstructions')
_BATCH = 32
_IS_SPLITS = 10
_LPIPS_SIDE = 31  # AlexNet's second pooling has no input below


def save_pairs(folder, position: int, pairs, mask) -> None:
  """Writes the valid images of a batch as FOLDER/KIND/NNNNNN.png.

  Args:
    folder: where originals and reconstructions are made.
    position: of the first row in the split; NNNNNN counts from there.
    pairs: originals and reconstructions, each uint8 [B, h, w, 3].
    mask: bool [B].
  """
  for kind, images in zip(KINDS, pairs, strict=True):
    (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
    for row in np.flatnonzero(mask):
      path = Path(folder) / kind / f'{position + row:06d}.png'
      Image.fromarray(images[row]).save(path, compress_level=1)


def import_packages():
  """Returns torch, torch_fidelity and lpips; ImportError says what to do."""
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

  rFID: Heusel et al. 2017, of reconstructions to originals; Inception Score of
  the reconstructions: Salimans et al. 2016; LPIPS: Zhang et al. 2018. Weights
  are downloaded once. What cannot be computed is left out with a warning.

  Args:
    folder: as `save_pairs` writes it.

  Returns:
    rfid, inception_score, inception_score_std and lpips, each with
    NAME_definition, a line.

  Raises:
    ImportError: a package is missing; says how to install it.
  """
  torch, torch_fidelity, lpips = import_packages()
  folders = [Path(folder) / kind for kind in KINDS]
  result = {}
  for metric, measure, package in (
    ('rfid, inception_score', _inception, torch_fidelity),
    ('lpips', _lpips, lpips),
  ):
    try:
      values, definition = measure(torch, package, *folders)
    except Exception as error:  # no network, no memory, too few images
      reason = ' '.join(str(error).split()) or type(error).__name__
      cache = Path(torch.hub.get_dir()) / 'checkpoints'
      logging.warning(
        '%s left out: %s (its weights belong in %s)', metric, reason, cache
      )
      continue
    for name, value in values.items():
      if math.isfinite(value):
        result |= {name: float(value), f'{name}_definition': definition}
      else:
        logging.warning('%s left out: it is %s', name, value)
  return result


def _inception(torch, torch_fidelity, originals, reconstructions):
  count = len(list(originals.iterdir()))
  if count < _IS_SPLITS:
    raise ValueError(f'expected at least {_IS_SPLITS} images, got {count}')
  options = {'fid': True, 'isc': True, 'isc_splits': _IS_SPLITS, 'cache': False}
  options |= {'batch_size': _BATCH, 'samples_find_ext': 'png', 'verbose': False}
  # Loads images in this process: JAX's threads do not survive a fork.
  options |= {'save_cpu_ram': True, 'cuda': torch.cuda.is_available()}
  values = torch_fidelity.calculate_metrics(
    input1=str(reconstructions), input2=str(originals), **options
  )
  return {
    'rfid': values['frechet_inception_distance'],  # lower is better
    'inception_score': values['inception_score_mean'],  # higher is better
    'inception_score_std': values['inception_score_std'],
  }, (
    f'torch-fidelity {importlib.metadata.version("torch-fidelity")}, '
    f'InceptionV3 (TensorFlow weights of 2015-12-05), PNG uint8, {count:,} '
    f'reconstructions (IS: {_IS_SPLITS} splits), reference: the originals, '
    'cropped alike'
  )


def _lpips(torch, lpips, originals, reconstructions):
  def read(folder, names):
    images = np.stack([np.asarray(Image.open(folder / n)) for n in names])
    return np.moveaxis(images, 3, 1).astype(np.float32) / 127.5 - 1

  names = sorted(path.name for path in originals.iterdir())
  side = min(read(originals, names[:1]).shape[2:])
  if side < _LPIPS_SIDE:
    raise ValueError(
      f'expected sides of at least {_LPIPS_SIDE} pixels, got {side}'
    )
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model, total = lpips.LPIPS(net='alex', verbose=False).to(device), 0.0
  with torch.inference_mode():
    for start in range(0, len(names), _BATCH):
      some = names[start : start + _BATCH]
      pair = (read(folder, some) for folder in (originals, reconstructions))
      pair = (torch.as_tensor(images, device=device) for images in pair)
      total += float(model(*pair).sum())
  return {'lpips': total / len(names)}, (
    f'lpips {importlib.metadata.version("lpips")}, AlexNet, weights v0.1, PNG '
    f'uint8, mean over {len(names):,} pairs at their own size; lower is better'
  )
