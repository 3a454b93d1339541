"""Metric files survive a cut and a resume; progress on a terminal."""

import contextlib
import io
import json
import logging
import time

import pytest

from rvq_jax.training.writers import (
  JsonlWriter,
  MultiWriter,
  Progress,
  read_jsonl,
)


def test_lines_come_back(tmp_path):
  writer = MultiWriter([JsonlWriter(tmp_path)])
  writer.write_scalars(1, {'loss': 0.5, 'bad': float('nan')})
  writer.close()
  assert read_jsonl(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 0.5, 'bad': None}
  ]


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
  writer = JsonlWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write_scalars(step, {'loss': step})
  writer.close()
  writer = JsonlWriter(tmp_path, start_step=2)
  writer.write_scalars(3, {'loss': 30})
  writer.close()
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  assert [r['loss'] for r in records] == [1, 2, 30]


def test_a_line_cut_off_in_writing_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 1}) + '\n{"step": 2, "lo')
  assert read_jsonl(path) == [{'step': 1}]


@pytest.mark.parametrize(
  'line',
  ['{"st', '', '\0\0\0', '7', '{"loss": 1}', '{"step": "3"}', '{"step": null}'],
)
def test_a_damaged_line_is_left_out_and_counted(line, tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  assert read_jsonl(path) == [{'step': 1}, {'step': 3}]
  [record] = caplog.records
  assert 'left out 1 damaged lines, the first is line 2' in record.getMessage()
  assert str(path) in record.getMessage()


def test_a_damaged_log_does_not_stop_a_resume(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + b'\xff\n' * 7 + b'{"step": 2}\n{"st')
  JsonlWriter(tmp_path, start_step=2).close()
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  assert '7 damaged lines, the first is line 2' in caplog.text


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


def test_what_is_logged_has_a_line_of_its_own_above_the_bar():
  with terminal() as stream:
    with Progress(0, 4, 8) as progress:
      progress.advance()
      logging.warning('cannot read x')
    logging.warning('after')
  lines = stream.getvalue().replace('\r', '\n').splitlines()
  assert 'cannot read x' in [line.strip() for line in lines]
  assert lines[-1] == 'after'


def test_progress_reports_speed_and_the_share_of_waiting(caplog):
  caplog.set_level(logging.INFO)
  with Progress(2, 8, 16) as progress:
    result = progress.report(4, {'loss': 0.5, 'mse': 0.25}, waited=1e6)
  assert result['data_wait'] == 1.0 and result['images_per_second'] > 0
  [record] = caplog.records
  assert 'step 4/8  loss 0.5000  mse 0.2500' in record.getMessage()
  assert '100% waiting for data' in record.getMessage()


def test_a_step_that_is_compiled_says_so(caplog):
  caplog.set_level(logging.INFO)
  with Progress(0, 8, 16) as progress, progress.compiling():
    pass
  assert caplog.messages == ['compiling the train step']
  with terminal() as stream, Progress(0, 8, 16) as progress:
    with progress.compiling():
      time.sleep(0.5)
    progress.report(4, {'loss': 0.5, 'mse': 0.25})
  text = stream.getvalue()
  assert len({f'step {mark} ' for mark in '|/-' if f'step {mark} ' in text}) > 1
  assert 'compiling' not in text[text.rindex('images/s') - 60 :]
  assert 'mse 0.2500' in text and 'loss' not in text


def test_the_speed_is_that_of_steps_without_compilation(monkeypatch):
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress(0, 8, 16) as progress:
    with progress.compiling():
      now[0] += 100
    now[0] += 2
    result = progress.report(1, {'mse': 0.25})
  assert result['images_per_second'] == 8
