"""One run of several processes: `jax.distributed` and XLA's collectives."""

import re

import jax

_CAUSES = 'gloo|nccl|unavailable|deadline.exceeded|heartbeat|connection|barrier'


def initialize(coordinator, num_processes, process_id, *, lost_after) -> None:
  """Joins the other processes of the run; call before any device is used.

  Args:
    coordinator: HOST:PORT of process 0. If it and the next two are None, JAX
      asks the scheduler, such as SLURM.
    num_processes: number of processes of the run.
    process_id: index of this process, from 0.
    lost_after: after so many seconds of silence, at least 10, a process counts
      as lost and the run ends.
  """
  given = (coordinator, num_processes, process_id)
  explicit = coordinator is not None
  if any((x is None) is explicit for x in given):
    raise ValueError(
      'expected all of --coordinator=HOST:PORT, --num_processes=N and '
      f'--process_id=I or none, got {", ".join(map(str, given))}'
    )
  if explicit and not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(f'--coordinator: expected HOST:PORT, got {coordinator!r}')
  if explicit and not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id: expected 0 to {num_processes - 1}, got {process_id}'
    )
  if lost_after < 10:
    raise ValueError(f'--lost_after: expected at least 10 s, got {lost_after}')
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # JAX's own handler would hide SIGTERM from `StopSignal`.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      *given,
      cluster_detection_method='deactivate' if explicit else None,
      heartbeat_timeout_seconds=lost_after,
    )
  except ValueError as error:
    if explicit:
      raise
    raise ValueError(
      '--multihost: expected a scheduler such as SLURM, found none; add '
      '--coordinator=HOST:PORT --num_processes=N --process_id=I'
    ) from error


def peer_is_lost(error: BaseException) -> bool:
  """Whether an error means that another process is lost or unreachable."""
  return (
    isinstance(error, jax.errors.JaxRuntimeError)
    and jax.process_count() > 1
    and re.search(_CAUSES, str(error), re.IGNORECASE) is not None
  )
