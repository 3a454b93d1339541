"""Orbax checkpoints of the state, with the data position and the config."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

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
  `optimizer` (the rest of the state) and `meta` (JSON: config and data
  position). Saves are asynchronous. The newest `keep` stay, and the best by the
  metric 'mse'. Use as a context manager: leaving it waits until the last save
  is complete on disk.

  Args:
    workdir: directory of the run.
    keep: newest checkpoints to keep.
    read_only: never create or delete anything.

  Raises:
    FileNotFoundError: read_only, and the directory holds no checkpoint.
  """

  def __init__(self, workdir, *, keep: int = 2, read_only: bool = False):
    self._path = Path(workdir).resolve() / 'checkpoints'
    if read_only and not self._path.is_dir():
      raise FileNotFoundError(
        f'expected a run with checkpoints in {workdir}, found none; train one '
        f'with python launch/main.py --workdir={workdir}'
      )
    policy = ocp.checkpoint_managers
    best = policy.BestN(
      get_metric_fn=_mse,
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    self._manager = ocp.CheckpointManager(
      self._path,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(
          [policy.LatestN(keep), best]
        ),
        best_fn=_mse,
        best_mode='min',
        create=not read_only,
        read_only=read_only,
      ),
      item_handlers={
        'model': ocp.StandardCheckpointHandler(),
        'optimizer': ocp.StandardCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()

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
    """
    if step is None:
      found = self._manager.latest_step()
    elif step == 'best':
      found = self._manager.best_step()
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
    parts = _parts(state)
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(parts['model']),
        optimizer=ocp.args.StandardSave(parts['optimizer']),
        meta=ocp.args.JsonSave({'config': config, 'position': position}),
      ),
      metrics=metrics,
      force=True,
    )
    if not saved:
      raise RuntimeError(f'the checkpoint of step {step} was not saved')

  def meta(self, step: int) -> dict[str, Any]:
    """{'config': ..., 'position': ...} as stored with a step."""
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
