"""Flags of launchers that several processes may run as one (docs/scale.md)."""

import logging

import command_line
from absl import flags

_MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Several processes, found through the scheduler.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, without a scheduler.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With the above.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'This one, from 0.')
_LOST_AFTER = flags.DEFINE_integer(
  'lost_after', 100, 'Seconds of silence after which a process is lost.'
)


def prepare_backend() -> None:
  """Prepares JAX; joins the other processes, of which the first alone logs."""
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if given != (None, None, None) and not _MULTIHOST.value:
    command_line.fail('--coordinator and the like: expected --multihost too')
  command_line.prepare_backend()
  if _MULTIHOST.value:
    from rvq_jax.training import multihost

    multihost.initialize(*given, lost_after=_LOST_AFTER.value)
    if not command_line.is_first():
      logging.getLogger().setLevel(logging.WARNING)
