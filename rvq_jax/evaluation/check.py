"""What must hold for every checkpoint, whatever it was trained on."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rvq_jax.evaluation.load import load
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.training import manifest
from rvq_jax.training.checkpoints import Checkpoints

_IMAGES = 4
_ROUNDING = 1e-4


class Finding(NamedTuple):
  """One thing that was looked at.

  Attributes:
    name: what must hold.
    ok: whether it does.
    detail: what was found.
  """

  name: str
  ok: bool
  detail: str

  def __str__(self):
    return f'{"ok" if self.ok else "FAILED":<7} {self.name}: {self.detail}'


def check_run(workdir, step: int | str | None = None) -> list[Finding]:
  """Checks the invariants of a checkpoint; needs no data set.

  Args:
    workdir: directory of a run.
    step: a saved step, 'best', or None for the newest.

  Returns:
    A finding each for: its files, finite numbers, codes and their moving
    averages, ids in range, decode(encode(x)) == reconstruct(x) to the bit. Only
    the first where the files are not what was saved.

  Raises:
    FileNotFoundError: there is no such run or step.
  """
  try:
    # Which step is the best one, sound scores alone can say.
    with Checkpoints(
      workdir, read_only=True, verify=step == 'best'
    ) as checkpoints:
      step = checkpoints.resolve(step)
  except ValueError as error:
    return [Finding('manifest', False, str(error))]
  folder = Path(workdir) / 'checkpoints' / str(step)
  fault = manifest.fault(folder)
  count = f'all files of step {step} have the SHA-256 they were saved with'
  findings = [Finding('manifest', fault is None, fault or count)]
  if fault is None:
    tokenizer = load(workdir, step)
    findings.append(_finite(tokenizer.variables))
    findings.append(_averages(tokenizer))
    findings += _round_trip(tokenizer)
  return findings


def _finite(variables) -> Finding:
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  bad = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, x in leaves
    if not np.isfinite(np.asarray(x)).all()
  ]
  numbers = sum(x.size for _, x in leaves)
  detail = f'{numbers:,} numbers in {len(leaves)} arrays'
  if bad:
    detail = f'NaN or Inf in {", ".join(bad[:3])} ({len(bad)} arrays)'
  return Finding('finite', not bad, detail)


def _books(tree, path=''):
  """(path, codebook as a dict) of each codebook in the collection."""
  if 'embedding_sum' in tree:
    yield path, {name: np.asarray(x, np.float64) for name, x in tree.items()}
    return
  for name, below in tree.items():
    if hasattr(below, 'items'):
      yield from _books(below, f'{path}/{name}')


def _averages(tokenizer: Tokenizer) -> Finding:
  """embedding = embedding_sum / smoothed cluster_size, in float64.

  A code that was replaced in the last step has its sum from its unsmoothed
  size, which is allowed for: it differs by the factor (n + eps) / n.
  """
  name = 'codes = embedding_sum / smoothed cluster_size'
  eps = tokenizer.config['model.eps']
  worst, codes, bad = 0.0, 0, []
  for path, book in _books(tokenizer.variables['codebook']):
    size, total = book['cluster_size'], book['cluster_size'].sum()
    embedding = book['embedding']
    if not total > 0:
      bad.append(f'{path}: no cluster has a size')
      continue
    with np.errstate(all='ignore'):  # what is not finite is wrong below
      smooth = (size + eps) / (total + len(size) * eps) * total
      want = book['embedding_sum'] / smooth[:, None]
      if tokenizer.config['model.cosine']:
        want /= np.linalg.norm(want, axis=1, keepdims=True)
      scale = np.linalg.norm(embedding, axis=1) + np.finfo(np.float32).tiny
      error = np.linalg.norm(embedding - want, axis=1) / scale
    allowed = _ROUNDING + eps / size.clip(eps) + len(size) * eps / total
    wrong = np.flatnonzero(~(error <= allowed))
    worst, codes = max(worst, float(error.max())), codes + len(size)
    bad += [f'{path} code {k}: off by {error[k]:.2g}' for k in wrong]
  if bad:
    return Finding(name, False, f'{"; ".join(bad[:3])} ({len(bad)} in all)')
  detail = f'{codes:,} codes, the farthest off by {worst:.1g} of its length'
  return Finding(name, True, detail if codes else 'no moving averages here')


def _round_trip(tokenizer: Tokenizer) -> list[Finding]:
  size = tokenizer.config['data.image_size']
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (_IMAGES, size, size, 3), np.uint8)
  images[0], images[1] = 0, 255
  ids = np.asarray(tokenizer.encode(images))
  k = tokenizer.codebook_size
  inside = bool(((ids >= 0) & (ids < k)).all())
  found = f'{ids.size} ids from {ids.min()} to {ids.max()}, K = {k}'
  findings = [Finding('ids in range', inside, found)]
  name = 'decode(encode(x)) == reconstruct(x)'
  if not inside:
    return [*findings, Finding(name, False, 'not tried')]
  one, other = (
    np.asarray(x)
    for x in (tokenizer.decode(ids), tokenizer.reconstruct(images))
  )
  differ = int((one.view(np.uint32) != other.view(np.uint32)).sum())
  same = differ == 0 and bool(np.isfinite(one).all())
  detail = f'{differ} of {one.size:,} numbers differ, {_IMAGES} images'
  return [*findings, Finding(name, same, detail)]
