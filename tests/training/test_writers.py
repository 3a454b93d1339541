"""Metric files survive a cut and a resume."""

import json

import pytest

from rvq_jax.training.writers import JsonlWriter, MultiWriter, read_jsonl


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
  assert 'left out 1 damaged of 3 lines (line 2)' in record.getMessage()
  assert str(path) in record.getMessage()


def test_a_damaged_log_does_not_stop_a_resume(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + b'\xff\n' * 7 + b'{"step": 2}\n{"st')
  JsonlWriter(tmp_path, start_step=2).close()
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  assert '7 damaged of 9 lines (line 2, 3, 4, 5, 6, ...)' in caplog.text
