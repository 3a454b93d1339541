"""Orbax checkpoints of the state, with the data position and the config."""

import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rvq_jax.io import read_json, tree_digest, utf8_path
from rvq_jax.training.config import other_version
from rvq_jax.training.state import TrainState

# Two private facts of Orbax: the suffix of an unfinished step, and the file of
# the JSON item. Old steps move to _DELETED before their removal, so a step that
# lacks a file is damaged.
_UNFINISHED = ocp.path.atomicity.TMP_DIR_SUFFIX
_META_FILE = 'meta/metadata'
_DELETED = '.deleted'
# Version of the arrays in `optimizer`; the other items open in any version.
_LAYOUT = 2


class DamagedError(ValueError):
  """A checkpoint is unreadable, or differs from its digest."""


class Checkpoints:
  """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

  Each holds three items: `model` (params, batch_stats, codebook, averages),
  `optimizer` (the rest of the state) and `meta` (JSON: config, data position,
  score, and the digests of all three). Every read checks the digest. The newest
  `keep` steps stay, and the one with the lowest score. Saves are asynchronous;
  leaving the context manager waits for the last one, except after a
  KeyboardInterrupt. All processes must see the directory. `read_only` creates
  and deletes nothing.
  """

  def __init__(self, workdir, *, keep: int = 2, read_only: bool = False):
    self._path = utf8_path(workdir) / 'checkpoints'
    self._read_only, self._keep = read_only, keep
    self._on_first_process(self._remove_rest)
    self._manager = ocp.CheckpointManager(
      self._path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,  # see `should_preserve`
        todelete_subdir=None if read_only else _DELETED,
        create=not read_only,
        read_only=read_only,
        lightweight_initialize=True,
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # Do not wait for a save after a second Ctrl-C, or if a process is lost.
    if kind is KeyboardInterrupt or (kind and jax.process_count() > 1):
      return
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    finally:
      # On a full disk, an unfinished save would keep its space.
      if not self._read_only and jax.process_index() == 0:
        self._remove_rest()

  @property
  def steps(self) -> list[int]:
    """All steps, oldest first."""
    return sorted(self._manager.all_steps())

  def resolve(self, step: int | str | None = None) -> int:
    """The saved step of a number, 'best' or None (the newest).

    If it does not exist, a FileNotFoundError lists the existing steps.
    """
    steps, number = self.steps, step
    if step in (None, 'best'):
      number = self._best(steps) if step else max(steps, default=None)
    if number not in steps:
      raise FileNotFoundError(
        f'expected a checkpoint of step {step or "any"} in {self._path}, found '
        f'steps {steps or "none"}'
      )
    return number

  def save(self, state: TrainState, *, config, position, score=None) -> None:
    """Starts saving a state, unless its step is already saved.

    `config` and `position` are dictionaries of JSON values; `score` is the
    validation mse, or None without evaluation.
    """
    step = int(state.step)
    if step in self.steps:
      return
    if score is not None and not math.isfinite(score):
      score = None  # NaN is neither better nor worse than a number
    items = _items(state)
    meta = {'config': config, 'position': position, 'score': score}
    meta['layout'] = _LAYOUT
    meta['digests'] = {name: tree_digest(item) for name, item in items.items()}
    meta['digest'] = _digest(meta)
    self._scores[step] = score
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      shutil.rmtree(self._path / _DELETED, ignore_errors=True)
    if not self._manager.save(step, args=args, force=True):
      raise RuntimeError(f'the checkpoint of step {step} was not saved')

  def meta(self, step: int) -> dict[str, Any]:
    """Config, position, score and digests; ValueError if damaged."""
    args = ocp.args.JsonRestore()
    return self._read(step, 'meta', args, lambda x: x['digest'] == _digest(x))

  def restore(self, state: TrainState, step: int) -> TrainState:
    """The state of an existing step; ValueError if damaged.

    `state`, or its `jax.eval_shape` with shardings, defines structure, shapes,
    dtypes and placement.
    """
    fields = {'averages': None}
    for name, item in _items(state).items():
      fields |= self._read_arrays(step, name, item)
    return TrainState(**fields)

  def restore_model(self, abstract: dict[str, Any], step: int):
    """Reads only the item `model`, into a tree of abstract arrays."""
    return self._read_arrays(step, 'model', abstract)

  def restore_newest(
    self, state: TrainState, check: Callable[[dict], None]
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest sound state and its meta; None without checkpoints.

    Moves damaged newer steps, and older ones with a damaged meta, to
    WORKDIR/corrupt. Calls `check` with the meta of a step before it reads the
    state; see `restore` for `state`.

    Raises:
      ValueError: none is sound, another version wrote it, or `check` raises it;
        no file changes.
    """
    damaged, newest = {}, None
    for step in reversed(self.steps):
      try:
        meta = self.meta(step)
        if newest is None:
          check(meta)
          if meta.get('layout') != _LAYOUT:
            raise other_version()
          newest = self.restore(state, step), meta
          resumed = step
      except DamagedError as error:
        damaged[step] = str(error).partition(';')[0]
    if newest:
      move = functools.partial(self._quarantine, damaged, resumed)
      self._on_first_process(move)
      self._manager.reload()
      return newest
    if damaged:
      raise ValueError(
        'no checkpoint is sound; restore a copy of one, or start in another '
        f'--workdir: {"; ".join(damaged.values())}'
      )
    return None

  @functools.cached_property
  def _scores(self) -> dict[int, float | None]:
    """Step -> score, for the steps with a sound meta."""
    scores = {}
    for step in self.steps:
      try:
        scores[step] = self.meta(step)['score']
      except DamagedError as error:
        logging.warning('%s', error)
    return scores

  def _best(self, steps) -> int | None:
    scored = [s for s in steps if self._scores.get(s) is not None]
    return min(scored, key=self._scores.get, default=None)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Tells Orbax which steps to keep.

    Orbax's BestN takes scores from a file without a digest: a flipped byte
    could delete the best step. `_best` reads only sound scores.
    """
    del context
    steps = [info.step for info in checkpoints]
    kept = {*steps[-self._keep :], self._best(steps)}
    return [step in kept for step in steps]

  def _read_arrays(self, step, item, abstract):
    digest = self.meta(step)['digests'][item]
    args = ocp.args.StandardRestore(abstract)
    return self._read(step, item, args, lambda x: tree_digest(x) == digest)

  def _read(self, step, item, args, is_sound):
    """Reads an item; any exception while reading counts as damage."""
    try:
      args = ocp.args.Composite(**{item: args})
      content = self._manager.restore(step, args=args)[item]
      if is_sound(content):
        return content
      reason = 'differs from its digest'
    except Exception as error:
      text = ' '.join(str(error).split())[:200].replace(';', ',')
      reason = f'cannot be read ({text or type(error).__name__})'
    others = ', '.join(str(s) for s in self.steps if s != step) or 'none'
    raise DamagedError(
      f'the checkpoint of step {step} in {self._path} is damaged: {item} '
      f'{reason}; load another step (found: {others}), or resume the run from '
      'the newest sound one by its command'
    )

  def _on_first_process(self, change: Callable[[], None]) -> None:
    """Lets the first process change the directory; the others wait."""
    if self._read_only:
      return
    if jax.process_index() == 0:
      change()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('rvq_jax: checkpoints changed')

  def _remove_rest(self) -> None:
    """Removes unfinished and deleted steps."""
    for path in (*self._path.glob(f'*{_UNFINISHED}*'), self._path / _DELETED):
      shutil.rmtree(path, ignore_errors=True)

  def _quarantine(self, damaged: dict[int, str], resumed: int) -> None:
    """Moves damaged steps {step: message} to WORKDIR/corrupt."""
    for step, message in damaged.items():
      target = self._path.parent / 'corrupt' / str(step)
      target.parent.mkdir(exist_ok=True)
      while target.exists():
        target = target.with_name(f'{target.name}-again')
      shutil.move(self._path / str(step), target)  # maybe to another disk
      logging.warning(
        '%s; moved to %s, resuming from step %d', message, target, resumed
      )


def has_checkpoints(workdir) -> bool:
  """Whether a run has any checkpoint, sound or damaged."""
  return any(p.name.isdecimal() for p in Path(workdir).glob('checkpoints/*'))


def is_run(folder) -> bool:
  """Whether a folder is a run of `train`, or the remains of one.

  config.json decides, else the checkpoints. A run that was killed early has
  neither, and no other files.
  """
  config = Path(folder) / 'config.json'
  if config.exists():
    return 'model.codebook_size' in (read_json(config) or {})
  metas = Path(folder).glob(f'checkpoints/*/{_META_FILE}')
  if any('digests' in (read_json(path) or {}) for path in metas):
    return True
  early = '.lock', 'checkpoints', '.config.json.'  # the last: half written
  names = [path.name for path in Path(folder).iterdir()]
  saved = any(Path(folder).glob('checkpoints/*'))
  return all(name.startswith(early) for name in names) and not saved


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
  """The state as Orbax items: `model`, for evaluation, and the rest."""
  model = dict(state.variables)
  if state.averages is not None:
    model['averages'] = state.averages
  names = ('step', 'nonfinite_streak', 'opt_state', 'discriminator')
  rest = {n: getattr(state, n) for n in names if getattr(state, n) is not None}
  return {'model': model, 'optimizer': rest}


def _digest(meta: dict[str, Any]) -> str:
  """SHA-256 of the JSON of `meta` without its own digest."""
  rest = {name: x for name, x in meta.items() if name != 'digest'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
