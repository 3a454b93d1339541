"""The form of all text for the terminal and the log."""

import logging
import re
import shlex
import sys
from pathlib import Path


def shown(text) -> str:
  """Text for the reader: no control characters, commands as typed.

  Messages name commands as `rvq train`; launch/main.py shows its own form.
  """
  folder = Path(sys.argv[0]).parent

  def as_started(match):
    file = folder / f'{match[1].replace("train", "main")}.py'
    started = (folder / 'checkout.py').is_file() and file.is_file()
    return f'python {shlex.quote(str(file))}' if started else match[0]

  text = re.sub(r'\brvq ([a-z]+)', as_started, str(text))
  return ''.join(
    c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text
  )


class Formatter(logging.Formatter):
  """Writes log lines as `shown`."""

  def format(self, record):
    """The line of a record."""
    return shown(super().format(record))
