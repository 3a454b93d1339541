"""Parsers: the text of a flag to its value."""

import ast
import contextlib

from absl import flags


class StepParser(flags.ArgumentParser):
  """A step's number, or best."""

  def parse(self, argument):
    """The value of a text; a ValueError says what it expected."""
    if argument != 'best' and not argument.isdecimal():
      raise ValueError(f'expected a number or best, got {argument!r}')
    return argument if argument == 'best' else int(argument)


class Parser(flags.ArgumentParser):
  """Parses like one of absl's parsers; an error says what it expected."""

  def __init__(self, parser, expected: str):
    self._parser, self._expected = parser, expected

  def parse(self, argument):
    """The value of a text; a ValueError says what it expected."""
    try:
      return self._parser.parse(argument)
    except (TypeError, ValueError) as error:
      reason = f'expected {self._expected}, got {argument!r}'
      raise ValueError(reason) from error


class TupleParser(flags.ArgumentParser):
  """A tuple or None; ml_collections reads 32 as (32,), and joins flags."""

  def parse(self, argument):
    """The value of a text; a ValueError says what it expected."""
    with contextlib.suppress(SyntaxError, ValueError):
      value = ast.literal_eval(str(argument))
      if value is None or isinstance(value, tuple | list):
        return value and tuple(value)
    raise ValueError(f'expected integers, as (64,), got {argument!r}')
