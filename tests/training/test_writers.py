"""Metric files survive a cut and a resume; progress on a terminal."""

import contextlib
import errno
import io
import logging
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rvq_jax.training.writers import (
  JsonlWriter,
  MultiWriter,
  Progress,
  TensorBoardWriter,
  read_jsonl,
)


def test_lines_come_back(tmp_path):
  writer = MultiWriter([JsonlWriter(tmp_path)])
  writer.write_scalars(1, {'loss': 0.5, 'bad': float('nan')})
  writer.close()
  assert read_jsonl(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 0.5, 'bad': None}
  ]


def test_tensorboard_gets_scalars_images_and_histograms(tmp_path):
  writer = TensorBoardWriter(tmp_path, start_step=4)
  writer.write_scalars(5, {'mse': 0.5})
  writer.write_images(5, {'grid': np.zeros((4, 6, 3), np.uint8)})
  writer.write_histograms(6, {'counts': np.arange(9)})
  writer.close()
  [path] = (tmp_path / 'tensorboard').iterdir()
  data, events = path.read_bytes(), []
  while data:  # length, checksum, event, checksum
    end = 12 + struct.unpack('Q', data[:8])[0]
    events.append(Event.FromString(data[12:end]))
    data = data[end + 4 :]
  version, start, mse, grid, counts = events
  assert version.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (5, start.session_log.START)
  [(mse_value,), (image,), (histogram,)] = (
    event.summary.value for event in (mse, grid, counts)
  )
  assert (mse.step, mse_value.tag, mse_value.simple_value) == (5, 'mse', 0.5)
  assert (image.image.height, image.image.width) == (4, 6)
  assert (counts.step, histogram.histo.sum) == (6, 36)


def test_a_writer_that_finds_no_room_does_not_keep_others_open():
  closed = []

  class Full:
    def close(self):
      closed.append(self)
      raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.raises(OSError, match='No space'):
    MultiWriter([Full(), Full()]).close()
  assert len(closed) == 2


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
  for start, steps, scale in ((0, (1, 2, 3), 1), (2, (3,), 10)):
    writer = JsonlWriter(tmp_path, start_step=start)
    for step in steps:
      writer.write_scalars(step, {'loss': scale * step})
    writer.close()
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  assert [r['loss'] for r in records] == [1, 2, 30]


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


def test_a_damaged_or_cut_log_does_not_stop_a_resume(tmp_path, caplog):
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
      assert 'compiling the train step' in stream.getvalue()
    progress.report(4, {'loss': 0.5, 'mse': 0.25})
  last = stream.getvalue().rpartition('\r')[2]
  assert 'mse 0.2500' in last and 'loss' not in last
  assert 'compiling' not in last


def test_the_speed_is_that_of_steps_without_compilation(monkeypatch):
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress(0, 8, 16) as progress:
    with progress.compiling():
      now[0] += 100
    now[0] += 2
    result = progress.report(1, {'mse': 0.25})
  assert result['images_per_second'] == 8
