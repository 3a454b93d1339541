"""Orbax checkpoints of the state, with the data position and the config."""

import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rvq_jax.io import tree_digest
from rvq_jax.training.state import TrainState

QUARANTINE = 'corrupt'
"""Folder beside `checkpoints` that damaged steps are moved to."""


class DamagedError(ValueError):
  """A checkpoint cannot be read, or is not what was saved."""


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
  """The state as Orbax items: what evaluation needs, and the rest."""
  model = dict(state.variables)
  if state.params_ema is not None:
    model['params_ema'] = state.params_ema
  optimizer = {
    'step': state.step,
    'nonfinite_streak': state.nonfinite_streak,
    'opt_state': state.opt_state,
  }
  return {'model': model, 'optimizer': optimizer}


def _json_digest(meta: dict[str, Any]) -> str:
  """SHA-256 of the JSON of `meta`, its own digest left out."""
  rest = {name: x for name, x in meta.items() if name != 'digest'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Checkpoints:
  """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

  Each holds three items: `model` (params, batch_stats, codebook, params_ema),
  `optimizer` (the rest of the state) and `meta` (JSON: config, data position,
  validation score, a digest of each of the other items and of itself). Every
  reader checks the digests of what it reads. Saves are asynchronous. The newest
  `keep` stay, and the best: the one with the lowest score. Use as a context
  manager: leaving it waits until the last save is complete, except after a
  KeyboardInterrupt. Of several processes each writes its share, into a
  directory that all of them see.

  Args:
    workdir: directory of the run.
    keep: newest checkpoints to keep.
    read_only: never create or delete anything; otherwise what a killed save
      left is removed.

  Raises:
    FileNotFoundError: read_only, and there are no checkpoints.
  """

  def __init__(self, workdir, *, keep: int = 2, read_only: bool = False):
    self._path = Path(workdir).resolve() / 'checkpoints'
    if read_only and not self._path.is_dir():
      raise FileNotFoundError(
        f'expected a run with checkpoints in {workdir}, found none; train one '
        'with python launch/main.py --config=configs/photos.py '
        f'--workdir={workdir}'
      )
    self._read_only, self._keep = read_only, keep
    self._on_first_process(self._remove_unfinished)
    self._manager = ocp.CheckpointManager(
      self._path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,
        create=not read_only,
        read_only=read_only,
        lightweight_initialize=True,
      ),
      item_handlers={
        'model': ocp.StandardCheckpointHandler(),
        'optimizer': ocp.StandardCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is KeyboardInterrupt:
      return  # whoever interrupts twice does not want to wait
    if kind is not None and jax.process_count() > 1:
      return  # a save would wait for a process that is gone
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    finally:
      # What a full disk left unfinished only makes it fuller.
      if not self._read_only and jax.process_index() == 0:
        self._remove_unfinished()

  @property
  def latest_step(self) -> int | None:
    """The newest step, or None."""
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """All steps, oldest first."""
    return sorted(self._manager.all_steps())

  def resolve(self, step: int | str | None = None) -> int:
    """The step that `step` means.

    Args:
      step: a step, 'best' (lowest score), or None for the newest.

    Returns:
      A step that exists.

    Raises:
      FileNotFoundError: there is no such checkpoint; lists the steps.
    """
    if step is None:
      found = self.latest_step
    elif step == 'best':
      found = self._best(self.steps)
    else:
      found = int(step) if int(step) in self.steps else None
    if found is None:
      raise FileNotFoundError(
        f'expected a checkpoint of step {step or "any"} in {self._path}, found '
        f'steps {self.steps or "none"}'
      )
    return found

  def save(
    self,
    state: TrainState,
    *,
    config: dict[str, Any],
    position: dict[str, Any],
    score: float | None = None,
  ) -> None:
    """Starts saving the state; a step that exists already is left alone.

    Args:
      state: the state to save.
      config: the run's config as plain JSON values.
      position: where the data loader stands.
      score: validation mse of this state, if it was evaluated.
    """
    step = int(state.step)
    if step in self.steps:
      return
    if score is not None and not math.isfinite(score):
      score = None  # NaN is neither better nor worse than a number
    parts = _parts(state)
    meta = {'config': config, 'position': position, 'score': score}
    meta['digests'] = {name: tree_digest(part) for name, part in parts.items()}
    meta['digest'] = _json_digest(meta)
    self._scores[step] = score
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta),
        **{name: ocp.args.StandardSave(part) for name, part in parts.items()},
      ),
      force=True,
    )
    if not saved:
      raise RuntimeError(f'the checkpoint of step {step} was not saved')

  def meta(self, step: int) -> dict[str, Any]:
    """The item `meta`: 'config', 'position', 'score' and 'digests'.

    Raises:
      ValueError: it is damaged.
    """
    meta = self._read(step, 'meta', ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.get('digest') != _json_digest(meta):
      raise self._damage(step, 'meta', 'is not what was saved')
    return meta

  def restore(self, state: TrainState, step: int) -> TrainState:
    """The saved state.

    Args:
      state: a state, or its `jax.eval_shape` with shardings, of the same
        structure; gives shapes, dtypes and placement.
      step: a step that exists.

    Returns:
      The state of that step.

    Raises:
      ValueError: an item is damaged.
    """
    digests = self.meta(step)['digests']
    parts = {
      name: self._read_arrays(
        step, name, jax.tree.map(_abstract, part), digests[name]
      )
      for name, part in _parts(state).items()
    }
    model = parts['model']
    return TrainState(
      params=model['params'],
      batch_stats=model['batch_stats'],
      codebook=model['codebook'],
      params_ema=model.get('params_ema'),
      **parts['optimizer'],
    )

  def restore_model(self, abstract: dict[str, Any], step: int):
    """The item `model` alone: what evaluation needs.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      step: a step that exists.

    Returns:
      The tree of arrays.

    Raises:
      ValueError: it is damaged.
    """
    digest = self.meta(step)['digests']['model']
    return self._read_arrays(step, 'model', abstract, digest)

  def restore_newest(
    self, state: TrainState, check: Callable[[dict], None]
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest sound checkpoint; damaged newer ones go to the quarantine.

    Args:
      state: see `restore`.
      check: called with the meta of a step before its state is read.

    Returns:
      The state and its meta; None if there are no checkpoints.

    Raises:
      ValueError: there are checkpoints, and none is sound; or what `check`
        raises. Nothing is changed then.
    """
    faults = {}
    for step in reversed(self.steps):
      try:
        meta = self.meta(step)
        check(meta)
        state = self.restore(state, step)
      except DamagedError as error:
        faults[step] = error
        continue
      self._on_first_process(lambda: self._clean(faults, step))  # noqa: B023
      self._manager.reload()
      return state, meta
    if faults:
      raise ValueError(
        f'no checkpoint in {self._path} is sound; put back a copy of one, or '
        'start in another --workdir: '
        + '; '.join(str(x).partition(';')[0] for x in faults.values())
      )
    return None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Answers Orbax which steps stay: the newest and the best."""
    del context
    steps = [info.step for info in checkpoints]
    keep = {*steps[-self._keep :], self._best(steps)}
    return [step in keep for step in steps]

  @functools.cached_property
  def _scores(self) -> dict[int, float | None]:
    """Step -> its score, of the steps whose meta is sound."""
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

  def _read(self, step, item, args):
    """An item as Orbax reads it. Whatever goes wrong counts as damage."""
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(**{item: args})
      )[item]
    except Exception as error:
      reason = ' '.join(str(error).split())[:200] or type(error).__name__
      raise self._damage(step, item, f'cannot be read ({reason})') from error

  def _read_arrays(self, step, item, abstract, digest):
    tree = self._read(step, item, ocp.args.StandardRestore(abstract))
    if tree_digest(tree) != digest:
      raise self._damage(step, item, 'is not what was saved')
    return tree

  def _damage(self, step, item, what) -> DamagedError:
    others = ', '.join(str(s) for s in self.steps if s != step)
    return DamagedError(
      f'the checkpoint of step {step} in {self._path} is damaged: {item} '
      f'{what}; load another --step (there are {others or "no others"}), or '
      'train on: the run resumes from the newest sound one'
    )

  def _on_first_process(self, change: Callable[[], None]) -> None:
    """Changes the directory once; the other processes wait for it."""
    if self._read_only:
      return
    if jax.process_index() == 0:
      change()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('rvq_jax: checkpoints changed')

  def _remove_unfinished(self) -> None:
    """Removes what a killed save left: Orbax's temporary names."""
    for path in self._path.glob(f'*{ocp.path.atomicity.TMP_DIR_SUFFIX}*'):
      shutil.rmtree(path, ignore_errors=True)

  def _clean(self, faults: dict[int, DamagedError], resumed: int) -> None:
    """Moves damaged steps away, removes half-deleted ones before `resumed`."""
    for step, error in faults.items():
      target = self._path.parent / QUARANTINE / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      os.rename(self._path / str(step), target)
      logging.warning(
        '%s; it was moved to %s, resuming from step %d',
        str(error).partition(';')[0],
        target,
        resumed,
      )
    for step in self.steps:
      path = self._path / str(step)
      if step < resumed and not (path / 'meta' / 'metadata').exists():
        shutil.rmtree(path, ignore_errors=True)


def _abstract(x):
  sharding = getattr(x, 'sharding', None)
  return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding)
