"""Stopping a run from outside without losing a step."""

import signal

import jax

from rvq_jax.training import multihost

# SIGUSR1 and SIGUSR2 are what SLURM's --signal is told to send before the time
# is up; SIGHUP comes when a terminal closes.
_STOPS = (
  signal.SIGTERM,
  signal.SIGINT,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGHUP,
)


class StopSignal:
  """Turns SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and SIGINT into a request to stop.

  The loop finishes its step, saves and leaves with 128 + the signal's number:
  143, 138, 140, 129, 130. A second SIGINT interrupts at once. A signal that is
  ignored already, as SIGHUP under nohup, stays ignored. Outside the main
  thread, where signals cannot be caught, nothing changes.

  Of several processes one need be asked: they agree to stop at the same step.

  Attributes:
    exit_code: what to leave with once the run is to stop, or None.
  """

  def __init__(self):
    self.exit_code = None
    self._received = 0
    self._alone = jax.process_count() == 1
    self._old = {}

  def __enter__(self):
    try:
      for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._old[number] = signal.signal(number, self._request)
    except ValueError:
      pass
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def agreed(self, *, ask: bool) -> bool:
    """Whether to stop after this step, the same answer in every process.

    Args:
      ask: ask the other processes, which costs a collective; all processes
        must do so at the same steps. One that is alone needs no asking.

    Returns:
      True from the step on at which the processes agreed.
    """
    if ask and not self._alone:
      self.exit_code = multihost.largest(self._received) or None
    return self.exit_code is not None

  def _request(self, number, frame):
    del frame
    if self._received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = 128 + number
    if self._alone:
      self.exit_code = self._received
