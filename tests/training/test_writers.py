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


def test_a_broken_line_before_the_last_is_an_error(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"st\n{"step": 2}\n')
  with pytest.raises(ValueError, match='line 1: not JSON'):
    read_jsonl(path)
