"""Files are whole or absent; a full disk is told from other errors."""

import contextlib
import os

import pytest

from rvq_jax.io import explain_full_disk, full_disk_reason, write_atomic


def test_the_reason_is_found_at_the_bottom_of_a_chain():
  try:
    try:
      raise OSError(28, 'No space left on device')
    except OSError as error:
      raise RuntimeError('the save failed') from error
  except RuntimeError as error:
    assert full_disk_reason(error) == 'No space left'
  text = 'RESOURCE_EXHAUSTED: ... [OS error 28: ENOSPC No space left on device]'
  assert full_disk_reason(ValueError(text)) == 'No space left'
  assert full_disk_reason(ValueError('no such file')) is None


def test_other_errors_pass_as_they_are(tmp_path):
  with pytest.raises(KeyError), explain_full_disk(tmp_path, 'try again'):
    raise KeyError('x')


def test_a_file_holds_the_old_or_the_new_content(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  write_atomic(path, 'old')

  def fail(descriptor):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fail)
    with contextlib.suppress(OSError):
      write_atomic(path, 'new')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']
