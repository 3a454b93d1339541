"""Ranges on the fields of linen modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from rvq_jax import VectorQuantizer
from rvq_jax.quantize.fields import Field, check, fault, field, fields_of

TUPLE = Field(tuple)
ESTIMATOR = fields_of(VectorQuantizer)['estimator']


class Layer(nn.Module):
  size: int = field(low=1, high=9)
  decay: float = field(0.99, 0, 1)
  sides: tuple[int, ...] | None = field(None)
  kind: str = field('a', choices=('a', 'b c'))
  dim: int | None = field(None, 1, 4)
  free: str = 'anything'

  @nn.compact
  def __call__(self, x):
    check(self)
    return nn.Dense(self.size)(x)


def test_kind_range_and_none_follow_from_the_field():
  assert fields_of(Layer) == {
    'size': Field(int, 1, 9),
    'decay': Field(float, 0, 1, before=0.99),
    'sides': Field(tuple, optional=True, before=None),
    'kind': Field(str, choices=('a', 'b c'), before='a'),
    'dim': Field(int, 1, 4, optional=True, before=None),
  }


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'size': 0}, 'size: expected a value from 1 to 9, got 0'),
    ({'sides': (0,)}, r'sides: expected integers .*, got \(0,\)'),
    ({'kind': 'c'}, "kind: expected one of a, 'b c', got 'c'"),
  ],
)
def test_a_value_out_of_its_range_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Layer(**{'size': 3} | arguments).init(jax.random.key(0), jnp.zeros((1, 2)))


@pytest.mark.parametrize(
  ('value', 'field', 'expected'),
  [
    ([64, 128], TUPLE, None),
    ((3,), TUPLE, None),
    ([], TUPLE, 'integers from 1 to 1048576'),
    ([64, 0], TUPLE, 'integers from 1 to 1048576'),
    ([64, 2**20 + 1], TUPLE, 'integers from 1 to 1048576'),
    ([64, True], TUPLE, 'integers from 1 to 1048576'),
    (64, TUPLE, 'integers from 1 to 1048576'),
    (None, Field(int, optional=True), None),
    (None, Field(int), 'a value'),
    (True, Field(int), 'an integer'),
    (1, Field(bool), 'True or False'),
    (1.0, Field(int), 'an integer'),
    (1, Field(float), None),
    (float('nan'), Field(float, 0), 'at least 0'),
    (float('inf'), Field(float, 0), 'a finite float32 number'),
    (0.5, Field(float, 0, 0.4), 'a value from 0 to 0.4'),
    (0.4, Field(float, 0, 0.4), None),
    (None, ESTIMATOR, 'a value'),
    ('STE', ESTIMATOR, 'one of rotation, rotation_unscaled'),
    ('ste', ESTIMATOR, None),
  ],
)
def test_a_fault_names_what_was_expected(value, field, expected):
  text = fault(value, field)
  assert text is None if expected is None else text.startswith(expected)
