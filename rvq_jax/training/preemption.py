"""Stopping a run from outside without losing a step."""

import contextlib
import os
import signal
import threading

import jax

from rvq_jax.data.loaders import STOP_SIGNALS
from rvq_jax.training import multihost


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
    self._pipe = ()

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self
    # Python runs the handler when the main thread is next free, once for all
    # signals of a kind that came until then; here each leaves a byte.
    self._pipe = os.pipe()
    for end in self._pipe:
      os.set_blocking(end, False)
    self._old_fd = signal.set_wakeup_fd(
      self._pipe[1], warn_on_full_buffer=False
    )
    for number in STOP_SIGNALS:
      if signal.getsignal(number) != signal.SIG_IGN:
        self._old[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._pipe:
      signal.set_wakeup_fd(self._old_fd)
      for end in self._pipe:
        os.close(end)

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
    came = b''
    with contextlib.suppress(BlockingIOError):
      came = os.read(self._pipe[0], 4096)
    again = self._received or came.count(number) > 1
    if again and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = 128 + number
    if self._alone:
      self.exit_code = self._received
