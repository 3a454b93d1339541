"""Ranges of a module's arguments, stated once, on its fields.

The module checks them; config fields of the same names take their ranges here.
"""

import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn

MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4028234663852886e38
_KINDS = {
  int: 'an integer',
  float: 'a number',
  str: 'text',
  bool: 'True or False',
}


class Field(NamedTuple):
  """The values that an argument may have.

  kind is int, float, bool, str or tuple (of widths); choices, if any, may be a
  table that grows; optional: None is allowed; before: the value for older
  configs that lack the field, if they may.
  """

  kind: type
  low: float = -float('inf')
  high: float = float('inf')
  choices: Collection | None = None
  optional: bool = False
  before: Any = dataclasses.MISSING


def field(
  default: Any = dataclasses.MISSING,
  low: float = -float('inf'),
  high: float = float('inf'),
  choices: Collection | None = None,
) -> Any:
  """A dataclass field of a linen module with its range; see `fields_of`.

  A default must not change: stored configs that lack the field rely on it.
  """
  metadata = {'range': (low, high, choices)}
  return dataclasses.field(default=default, metadata=metadata)


def fields_of(cls: type[nn.Module]) -> dict[str, Field]:
  """Name -> `Field` for each argument of a module's class with a range."""
  ranges = {}
  for f in dataclasses.fields(cls):
    if 'range' not in f.metadata:
      continue
    union = isinstance(f.type, types.UnionType)  # T | None
    kind: Any = typing.get_args(f.type)[0] if union else f.type
    kind = typing.get_origin(kind) or kind  # tuple[int, ...] is a tuple
    low, high, choices = f.metadata['range']
    ranges[f.name] = Field(kind, low, high, choices, union, f.default)
  return ranges


def fault(value: Any, field: Field) -> str | None:
  """The expectation of `field` in words; None if `value` meets it."""
  if value is None:
    return None if field.optional else 'a value'
  if field.kind is tuple:
    fits = isinstance(value, tuple | list) and all(
      type(v) is int and 1 <= v <= 2**20 for v in value
    )
    widths = 'integers from 1 to 1048576, as (64, 128, 256)'
    return None if fits and value else widths
  kind: Any = (int, float) if field.kind is float else field.kind
  if not isinstance(value, kind) or (
    isinstance(value, bool) and field.kind is not bool
  ):
    return _KINDS[field.kind]
  if field.choices and value not in field.choices:
    shown = (x if str(x).isidentifier() else repr(x) for x in field.choices)
    return f'one of {", ".join(map(str, shown))}'
  if field.kind in (int, float) and not field.low <= value <= field.high:
    if field.high >= MAX_INT32:
      return f'at least {field.low:g}'
    return f'a value from {field.low:g} to {field.high:g}'
  if field.kind is float and abs(value) > _MAX_FLOAT32:
    return 'a finite float32 number'
  return None


def check(module: nn.Module) -> None:
  """Raises ValueError for an argument outside its range."""
  for name, field in fields_of(type(module)).items():
    value = getattr(module, name)
    if expected := fault(value, field):
      raise ValueError(f'{name}: expected {expected}, got {value!r}')
