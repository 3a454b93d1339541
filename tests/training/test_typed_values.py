"""Whatever a user types for a config field runs, or ends in one line."""

import functools
import math
import traceback
from pathlib import Path

import hypothesis.strategies as st
import jax
import pytest
from absl import flags
from hypothesis import example, given, settings
from ml_collections import config_flags
from tiny_step import Run

import rvq_jax
from rvq_jax.training.config import (
  FIELDS,
  check_config,
  check_devices,
  flatten,
)

PACKAGE = Path(rvq_jax.__file__).parent

# A slip of the finger, another type, the ends of every range, no text at all.
NUMBERS = st.one_of(
  st.integers(-3, 70),
  st.sampled_from([2**n + d for n in (10, 31, 32, 63, 64) for d in (-1, 0, 1)]),
  st.floats(),
  st.sampled_from(['1e3', '1e-400', '1e400', '-0.0', '0x10', '1_000', '٣']),
)
WORDS = (
  ' |None|True|yes|nan|()|(4,)|(4,8,|[4, 8]|(4,-8)|(4,8.5)|vq|residual|fsq|'
  'folder:|folder:/|folder:\0|tfds:../x|photos|../..|~|rotation|bfloat16|'
  'random|paper|constant|two_weights|(99999999999999999999,)|'
).split('|')
TEXTS = st.one_of(
  st.sampled_from(WORDS),
  st.text(max_size=8),
  st.integers(1, 70).map(lambda n: f'({n},{n})'),
)
TYPED = st.one_of(NUMBERS.map(str), TEXTS)
NAMES = st.sampled_from(sorted(FIELDS))


def typed(config, name, text):
  """The config with --config.NAME=TEXT; None where the launchers refuse it."""
  values, words = flags.FlagValues(), ['program', f'--config.{name}={text}']
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=words
  )
  try:
    values(words)
  except Exception:
    return None
  return values['config'].value


def trace_step(config):
  check_devices(check_config(config), jax.device_count())  # as train() does
  run = Run(config)
  rows, size = run.config['batch_size'], run.config['data.image_size']
  batch = {'image': jax.ShapeDtypeStruct((rows, size, size, 3), 'uint8')}
  jax.eval_shape(functools.partial(run.train_step, 1), run.template, batch)
  run.loader.close()
  return run.config


@pytest.mark.parametrize(
  'use', [check_config, pytest.param(trace_step, marks=pytest.mark.slow)]
)
@settings(max_examples=100, deadline=None)
@given(name=NAMES, text=TYPED)
@example(name='model.widths', text='32')
@example(name='model.widths', text='(1000000,8)')
@example(name='model.widths', text='18446744073709551616')
@example(name='model.codebook_size', text='-5')
@example(name='model.codebook_size', text='2147483647')
@example(name='model.commitment_weight', text='1e39')
@example(name='batch_size', text='1')
@example(name='num_epochs', text='10000000')
@example(name='data.image_size', text='16384')
@example(name='data.name', text='folder:\0')
@example(name='data.data_dir', text='\0')
@example(name='optimizer.learning_rate', text='1e300')
@example(name='optimizer.weight_decay', text='1e308')
@example(name='optimizer.warmup_steps', text='2147483647')
def test_a_typed_value_is_used_as_it_stands_or_refused(
  use, name, text, make_tiny_config
):
  config = typed(make_tiny_config(), name, text)
  if config is None:
    return
  try:
    flat = use(config)
  except (ValueError, OSError, FloatingPointError) as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert PACKAGE in Path(frame.filename).parents, repr(error)
    assert str(error) and '\n' not in str(error)
    return
  value, field = flat[name], FIELDS[name]
  if value is None:
    assert field.optional
  elif field.kind is tuple:
    assert value and all(type(v) is int and v > 0 for v in value)
  elif field.kind in (int, float):
    assert math.isfinite(value) and field.low <= value <= field.high
    assert value == (int(text, 0) if field.kind is int else float(text))
  elif field.choices:
    assert value in field.choices


def test_all_fields_are_tried_and_typed(tiny_config):
  config = typed(tiny_config, 'model.codebook_size', '77')
  assert config.model.codebook_size == 77
  assert set(flatten(config)) == set(FIELDS)
