"""Worker processes of the data loader: only their run stops them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

STOP_SIGNALS = (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP)
"""Signals that stop a run (SLURM sends SIGUSR1 or SIGUSR2), not its workers."""


@contextlib.contextmanager
def hold_signals():
  """Blocks the stop signals here and in workers that start meanwhile."""
  old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
  try:
    resource_tracker.ensure_running()  # its start unblocks two of them
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, old)


def init_worker(*_) -> None:
  """Lets a worker of Grain ignore the stop signals and end with its parent."""
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()  # returns however the parent ends
  os._exit(1)
