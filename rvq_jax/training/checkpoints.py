"""Orbax checkpoints of the state, with the data position and the config."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rvq_jax.training import machine, manifest
from rvq_jax.training.state import TrainState


def _mse(metrics):
  return metrics['mse']


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


class Checkpoints:
  """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

  Each holds three items: `model` (params, batch_stats, codebook, params_ema),
  `optimizer` (the rest of the state) and `meta` (JSON: config, data position
  and machine). Saves are asynchronous. The newest `keep` stay, and the best by
  the metric 'mse'. Use as a context manager: leaving it waits until the last
  save is complete on disk, except after a KeyboardInterrupt. Of several
  processes each writes its share, into a directory that all of them see; a save
  is complete when all have written.

  Each step holds the SHA-256 of its files (manifest.py). Opening a run to write
  removes what a killed one left, and moves damaged newest steps out of the way;
  read_only, a damaged step is refused.

  Args:
    workdir: directory of the run.
    keep: newest checkpoints to keep.
    read_only: never create or delete anything.
    verify: read_only, refuse a step whose files are not as they were saved.

  Raises:
    FileNotFoundError: read_only, and the directory holds no checkpoint.
    ValueError: there are checkpoints, and none is intact.
  """

  def __init__(
    self,
    workdir,
    *,
    keep: int = 2,
    read_only: bool = False,
    verify: bool = True,
  ):
    self._path = Path(workdir).resolve() / 'checkpoints'
    if read_only and not self._path.is_dir():
      raise FileNotFoundError(
        f'expected a run with checkpoints in {workdir}, found none; train one '
        'with python launch/main.py --config=configs/photos.py '
        f'--workdir={workdir}'
      )
    if not read_only:
      if jax.process_index() == 0:
        manifest.recover(self._path)
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices('rvq_jax: checkpoints recovered')
    self._read_only, self._verify = read_only, verify
    try:
      self._manager = self._open(keep)
    # Orbax reads the scores of every step; what it makes of damaged ones is an
    # error of JSON, of Unicode, or of a name that is not there.
    except Exception:
      self._require_scores()
      raise

  def _open(self, keep: int) -> ocp.CheckpointManager:
    policy = ocp.checkpoint_managers
    best = policy.BestN(
      get_metric_fn=_mse,
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    return ocp.CheckpointManager(
      self._path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(
          [policy.LatestN(keep), best]
        ),
        best_fn=_mse,
        best_mode='min',
        create=not self._read_only,
        read_only=self._read_only,
        temporary_path_class=manifest.SealedPath,
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
        manifest.remove_unfinished(self._path)

  @property
  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def resolve(self, step: int | str | None = None) -> int:
    """The step that `step` means.

    Args:
      step: a step, 'best' (lowest mse), or None for the newest.

    Returns:
      A step that exists.

    Raises:
      FileNotFoundError: there is no such checkpoint; lists those there are.
      ValueError: it is damaged, by the SHA-256 of its files.
    """
    if step is None:
      found = self._manager.latest_step()
    elif step == 'best':
      if self._verify:
        self._require_scores()
      found = self._manager.best_step()
    else:
      found = int(step) if int(step) in self.steps else None
    if found is None:
      raise FileNotFoundError(
        f'expected a checkpoint of step {step or "any"} in {self._path}, found '
        f'steps {self.steps or "none"}'
      )
    if self._verify:
      self._refuse_damaged(found)
    return found

  def _require_scores(self) -> None:
    for step in manifest.steps(self._path):
      self._refuse_damaged(step, part='metrics/')

  def _refuse_damaged(self, step: int, part: str = '') -> None:
    what = manifest.fault(self._path / str(step), part=part)
    if what:
      others = [s for s in reversed(manifest.steps(self._path)) if s != step]
      raise ValueError(
        f'the checkpoint of step {step} in {self._path} is damaged: {what}; '
        'training goes on from the one before it, and to load another one '
        f'give its step (there are {", ".join(map(str, others)) or "no others"}'
        ')'
      )

  def save(
    self,
    state: TrainState,
    *,
    config: dict[str, Any],
    position: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts saving the state; a step that is there already is left alone.

    Args:
      state: the state to save.
      config: the run's config as plain JSON values.
      position: where the data loader stands.
      metrics: of an evaluation of this state; 'mse' ranks the checkpoint.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    if metrics and not math.isfinite(_mse(metrics)):
      metrics = None  # NaN is neither better nor worse than a number
    parts = _parts(state)
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(parts['model']),
        optimizer=ocp.args.StandardSave(parts['optimizer']),
        meta=ocp.args.JsonSave(
          {
            'config': config,
            'position': position,
            'machine': machine.describe(),
          }
        ),
      ),
      metrics=metrics,
      force=True,
    )
    if not saved:
      raise RuntimeError(f'the checkpoint of step {step} was not saved')

  def meta(self, step: int) -> dict[str, Any]:
    """What is stored with a step: 'config', 'position' and 'machine'."""
    return self._manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )['meta']

  def restore(self, state: TrainState, step: int) -> TrainState:
    """The saved state.

    Args:
      state: a state, or its `jax.eval_shape` with shardings, of the same
        structure; gives shapes, dtypes and placement.
      step: a step that exists.

    Returns:
      The state of that step.
    """
    parts = {
      name: jax.tree.map(_abstract, part)
      for name, part in _parts(state).items()
    }
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{n: ocp.args.StandardRestore(part) for n, part in parts.items()}
      ),
    )
    model, optimizer = restored['model'], restored['optimizer']
    return TrainState(
      params=model['params'],
      batch_stats=model['batch_stats'],
      codebook=model['codebook'],
      params_ema=model.get('params_ema'),
      **optimizer,
    )

  def restore_model(self, abstract: dict[str, Any], step: int):
    """The item `model` alone: what evaluation needs.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      step: a step that exists.

    Returns:
      The tree of arrays.
    """
    return self._manager.restore(
      step, args=ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
    )['model']


def _abstract(x):
  sharding = getattr(x, 'sharding', None)
  return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding)
