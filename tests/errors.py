"""What every test of an error expects: one line that says what is wrong."""

import contextlib

import pytest


@contextlib.contextmanager
def one_line(message: str, kind: type[Exception] = ValueError):
  """Expects an error of one line, in which the pattern `message` is found."""
  with pytest.raises(kind, match=message) as caught:
    yield caught
  assert '\n' not in str(caught.value)
