"""What a person sees of a run on a terminal."""

import contextlib
import io
import logging

from rvq_jax.training.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@contextlib.contextmanager
def terminal():
  """Standard error as a terminal, and the log on it."""
  with contextlib.redirect_stderr(Terminal()) as stream:
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
      yield stream
    finally:
      logging.getLogger().removeHandler(handler)


def test_the_bar_says_that_it_waits_for_the_compiler_until_the_first_step():
  with terminal() as stream:
    progress = Progress(0, 4, 8)
    assert 'compiling' in stream.getvalue()
    stream.truncate(0)
    progress.advance(2)
    progress.report(2, {'loss': 0.5})
    progress.close()
  assert 'loss 0.5000' in stream.getvalue()
  assert 'compiling' not in stream.getvalue()


def test_what_is_logged_has_a_line_of_its_own_above_the_bar():
  with terminal() as stream:
    progress = Progress(0, 4, 8)
    progress.advance(2)
    logging.warning('skipped image x')
    progress.close()
    logging.warning('after')
  lines = stream.getvalue().replace('\r', '\n').splitlines()
  assert 'skipped image x' in [line.strip() for line in lines]
  assert lines[-1] == 'after'
