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


class DamagedError(ValueError):
  """A checkpoint cannot be read, or is not what was saved."""


class Checkpoints:
  """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

  Each holds three items: `model` (params, batch_stats, codebook, averages),
  `optimizer` (the rest of the state) and `meta` (JSON: config, data position,
  score, and the digests of the other items and of itself). Readers check what
  they read. The newest `keep` steps stay, and the one with the lowest score.
  Saves are asynchronous; leaving the context manager waits for the last one,
  except after a KeyboardInterrupt. All processes must see the directory.

  Args:
    workdir: directory of the run.
    keep: newest checkpoints to keep.
    read_only: never create or delete anything.
  """

  def __init__(self, workdir, *, keep: int = 2, read_only: bool = False):
    self._path = Path(workdir).resolve() / 'checkpoints'
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
    # Whoever interrupts twice does not want to wait, and the save of several
    # processes would wait for one that is gone.
    if kind is KeyboardInterrupt or (kind and jax.process_count() > 1):
      return
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    finally:
      # What a full disk left unfinished only makes it fuller.
      if not self._read_only and jax.process_index() == 0:
        self._remove_unfinished()

  @property
  def steps(self) -> list[int]:
    """All steps, oldest first."""
    return sorted(self._manager.all_steps())

  def resolve(self, step: int | str | None = None) -> int:
    """The step that a number, 'best' or None (the newest) means.

    Raises:
      FileNotFoundError: it does not exist; lists those that do.
    """
    steps, found = self.steps, step
    if step is None:
      found = max(steps, default=None)
    elif step == 'best':
      found = self._best(steps)
    if found not in steps:
      raise FileNotFoundError(
        f'expected a checkpoint of step {step or "any"} in {self._path}, found '
        f'steps {steps or "none"}'
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
    """Starts saving a state; a step that exists already is left alone.

    Args:
      state: the state, with its step.
      config: JSON values.
      position: of the data loader.
      score: validation mse, if the state was evaluated.
    """
    step = int(state.step)
    if step in self.steps:
      return
    if score is not None and not math.isfinite(score):
      score = None  # NaN is neither better nor worse than a number
    items = _items(state)
    meta = {'config': config, 'position': position, 'score': score}
    meta['digests'] = {name: tree_digest(item) for name, item in items.items()}
    meta['digest'] = _json_digest(meta)
    self._scores[step] = score
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta),
        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
      ),
      force=True,
    )
    if not saved:
      raise RuntimeError(f'the checkpoint of step {step} was not saved')

  def meta(self, step: int) -> dict[str, Any]:
    """Config, position, score and digests; ValueError if damaged."""
    is_sound = lambda meta: meta['digest'] == _json_digest(meta)  # noqa: E731
    return self._read(step, 'meta', ocp.args.JsonRestore(), is_sound)

  def restore(self, state: TrainState, step: int) -> TrainState:
    """The state of a step that exists; ValueError if damaged.

    Args:
      state: a state, or its `jax.eval_shape` with shardings: the structure,
        shapes, dtypes and placement.
      step: the step.
    """
    digests = self.meta(step)['digests']
    model, optimizer = (
      self._read_arrays(step, name, jax.tree.map(_abstract, item), digests)
      for name, item in _items(state).items()
    )
    return TrainState(**{'averages': None} | model | optimizer)

  def restore_model(self, abstract: dict[str, Any], step: int):
    """The item `model` alone; ValueError if damaged.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      step: the step.
    """
    digests = self.meta(step)['digests']
    return self._read_arrays(step, 'model', abstract, digests)

  def restore_newest(
    self, state: TrainState, check: Callable[[dict], None]
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest sound state and its meta; None without checkpoints.

    Damaged newer steps are moved to WORKDIR/corrupt.

    Args:
      state: see `restore`.
      check: called with the meta of a step before its state is read.

    Raises:
      ValueError: no checkpoint is sound, or what `check` raises; nothing is
        changed then.
    """
    damaged = {}
    for step in reversed(self.steps):
      try:
        meta = self.meta(step)
        check(meta)
        state = self.restore(state, step)
      except DamagedError as error:
        damaged[step] = str(error).partition(';')[0]
        continue
      self._on_first_process(functools.partial(self._quarantine, damaged, step))
      self._manager.reload()
      return state, meta
    if damaged:
      raise ValueError(
        'no checkpoint is sound; put back a copy of one, or start in another '
        f'--workdir: {"; ".join(damaged.values())}'
      )
    return None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Tells Orbax which steps stay: the newest and the best."""
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

  def _read_arrays(self, step, item, abstract, digests):
    is_sound = lambda tree: tree_digest(tree) == digests[item]  # noqa: E731
    args = ocp.args.StandardRestore(abstract)
    return self._read(step, item, args, is_sound)

  def _read(self, step, item, args, is_sound):
    """An item as Orbax reads it; whatever goes wrong counts as damage."""
    try:
      args = ocp.args.Composite(**{item: args})
      found = self._manager.restore(step, args=args)[item]
      fault = None if is_sound(found) else 'is not what was saved'
    except Exception as error:
      reason = ' '.join(str(error).split())[:200].replace(';', ',')
      fault = f'cannot be read ({reason or type(error).__name__})'
    if fault:
      others = ', '.join(str(s) for s in self.steps if s != step) or 'none'
      raise DamagedError(
        f'the checkpoint of step {step} in {self._path} is damaged: {item} '
        f'{fault}; load another step (there are: {others}), or resume the run, '
        'which starts from the newest sound one'
      )
    return found

  def _on_first_process(self, change: Callable[[], None]) -> None:
    """Changes the directory once; the other processes wait for it."""
    if not self._read_only and jax.process_index() == 0:
      change()
    if not self._read_only and jax.process_count() > 1:
      multihost_utils.sync_global_devices('rvq_jax: checkpoints changed')

  def _remove_unfinished(self) -> None:
    """Removes what a killed process left half written or half deleted."""
    gone = [*self._path.glob(f'*{ocp.path.atomicity.TMP_DIR_SUFFIX}*')]
    steps = [p for p in self._path.glob('*') if p.name.isdecimal()]
    steps.sort(key=lambda path: int(path.name))  # the newest is never deleted
    gone += [p for p in steps[:-1] if not (p / 'meta/metadata').exists()]
    for path in gone:
      shutil.rmtree(path, ignore_errors=True)

  def _quarantine(self, damaged: dict[int, str], resumed: int) -> None:
    for step, message in damaged.items():
      target = self._path.parent / 'corrupt' / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      os.rename(self._path / str(step), target)
      logging.warning(
        '%s; moved to %s, resuming from step %d', message, target, resumed
      )


def has_checkpoints(workdir) -> bool:
  """Whether a run has any checkpoint, sound or not."""
  paths = (Path(workdir) / 'checkpoints').glob('*')
  return any(path.name.isdecimal() for path in paths)


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
  """The state as Orbax items: what evaluation needs, and the rest."""
  model = dict(state.variables)
  if state.averages is not None:
    model['averages'] = state.averages
  names = ('step', 'nonfinite_streak', 'opt_state', 'discriminator')
  rest = {name: getattr(state, name) for name in names}
  rest = {name: item for name, item in rest.items() if item is not None}
  return {'model': model, 'optimizer': rest}


def _json_digest(meta: dict[str, Any]) -> str:
  """SHA-256 of the JSON of `meta`, its own digest left out."""
  rest = {name: x for name, x in meta.items() if name != 'digest'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _abstract(x):
  sharding = getattr(x, 'sharding', None)
  return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding)
