"""Stopping a run from outside without losing a step."""

import signal


class StopSignal:
  """Turns SIGTERM and the first SIGINT into a request to stop.

  The loop finishes its step, saves and leaves with the exit code that the
  signal calls for (143, 130). A second SIGINT interrupts at once. Outside the
  main thread, where signals cannot be caught, nothing changes.
  """

  def __init__(self):
    self.exit_code = None
    self._old = {}

  def __enter__(self):
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._request)
    except ValueError:
      pass
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _request(self, number, frame):
    del frame
    if self.exit_code is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.exit_code = 128 + number
