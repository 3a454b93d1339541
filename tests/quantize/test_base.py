"""The one schema of arguments: what fits, and what is said of what does not."""

import pytest

from rvq_jax import VectorQuantizer
from rvq_jax.quantize.fields import Field, fault, fields_of

TUPLE = Field(tuple)
FIELDS = fields_of(VectorQuantizer)


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
    (float('inf'), Field(float, 0), 'a finite number'),
    (0.5, Field(float, 0, 0.4), 'a value from 0 to 0.4'),
    (0.4, Field(float, 0, 0.4), None),
    ('STE', FIELDS['estimator'], 'one of rotation, rotation_unscaled'),
    ('ste', FIELDS['estimator'], None),
  ],
)
def test_a_fault_names_what_was_expected(value, field, expected):
  found = fault(value, field)
  assert found is None if expected is None else found.startswith(expected)
