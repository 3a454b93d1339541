"""Stops a run by a signal without losing a step."""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from rvq_jax.data.workers import STOP_SIGNALS


class StopSignal:
  """Turns SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and SIGINT into a request to stop.

  The loop finishes its step, saves and exits with `exit_code`, 128 + the number
  of the signal (None before a signal); a second SIGINT interrupts at once.
  Ignored signals stay ignored, such as SIGHUP under nohup. Outside the main
  thread nothing changes. If one of several processes gets a signal, all stop at
  the same step.
  """

  def __init__(self):
    self.exit_code = None
    self._received = 0
    self._alone = jax.process_count() == 1
    self._old = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._old[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def agreed(self, *, ask: bool) -> bool:
    """Whether all processes must stop; they `ask` each other at one step."""
    if ask and not self._alone:
      received = multihost_utils.process_allgather(np.int32(self._received))
      self.exit_code = int(received.max()) or None
    return self.exit_code is not None

  def _request(self, number, _):
    if self._received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = 128 + number
    if self._alone:
      self.exit_code = self._received
