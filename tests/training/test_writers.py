"""Metric files survive a cut and a resume; progress on a terminal."""

import contextlib
import errno
import fcntl
import io
import logging
import pty
import select
import struct
import termios

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


def test_lines_come_back_but_for_those_after_the_checkpoint(tmp_path):
  for start, steps, scale in ((0, (1, 2, 3), 1), (2, (3,), 10)):
    writer = MultiWriter([JsonlWriter(tmp_path, start_step=start)])
    for step in steps:
      writer.write_scalars(step, {'loss': scale * step, 'bad': float('nan')})
    writer.close()
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  lines = [list(record.values()) for record in records]
  assert lines == [[1, 1, None], [2, 2, None], [3, 30, None]]


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


DAMAGED = [
  b'{"st',
  b'',
  b'\0\0',
  b'7',
  b'{"loss": 1}',
  b'{"step": "3"}',
  b'\xff',
]


def test_damaged_lines_are_left_out_and_counted_on_a_resume(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": 1}', *DAMAGED, b'{"step": 2}', b'{"st']
  path.write_bytes(b'\n'.join(lines))
  JsonlWriter(tmp_path, start_step=2).close()
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  text = f'{path}: skipped 7 damaged lines, the first is line 2'
  assert caplog.messages == [text]


@contextlib.contextmanager
def terminal():
  """Standard error as a terminal, and the log on it."""
  with contextlib.redirect_stderr(io.StringIO()) as stream:
    stream.isatty = lambda: True
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
      yield stream
    finally:
      logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize(('rows', 'kind'), [(0, 'line'), (24, 'bar')])
def test_a_terminal_without_rows_gets_lines(rows, kind, caplog):
  caplog.set_level(logging.INFO)
  ours, theirs = pty.openpty()
  with open(ours, 'rb'), open(theirs, 'w') as stream:
    size = struct.pack('4H', rows, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    with contextlib.redirect_stderr(stream), Progress(0, 4, 8) as progress:
      progress.report(1, {'mse': 0.25})
    stream.flush()
    readable, _, _ = select.select([ours], [], [], 0)
  shown = {'line': ['step 1/4' in caplog.text], 'bar': readable}
  assert [name for name in shown if any(shown[name])] == [kind]


def test_what_is_logged_has_a_line_of_its_own_above_the_bar():
  with terminal() as stream:
    with Progress(0, 4, 8) as progress:
      progress.advance()
      logging.warning('cannot read x')
    logging.warning('after')
  lines = stream.getvalue().replace('\r', '\n').splitlines()
  assert 'cannot read x' in [line.strip() for line in lines]
  assert lines[-1] == 'after'


def test_progress_reports_speed_without_compilation_and_the_share_of_waiting(
  caplog, monkeypatch
):
  caplog.set_level(logging.INFO)
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress(2, 8, 16) as progress:
    with progress.compiling():
      now[0] += 100
    now[0] += 4
    result = progress.report(4, {'loss': 0.5, 'mse': 0.25}, waited=1)
  assert result == {'images_per_second': 8, 'data_wait': 0.25}
  first, second = caplog.messages
  assert first == 'compiling the train step'
  assert 'step 4/8  loss 0.5000  mse 0.2500' in second
  assert '25% waiting for data' in second


def test_a_bar_says_that_a_step_is_compiled():
  with terminal() as stream, Progress(0, 8, 16) as progress:
    with progress.compiling():
      assert 'compiling the train step' in stream.getvalue()
    progress.report(4, {'loss': 0.5, 'mse': 0.25})
  last = stream.getvalue().rpartition('\r')[2]
  assert 'mse 0.2500' in last and 'loss' not in last
  assert 'compiling' not in last
