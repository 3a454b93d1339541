"""Files are whole or absent, locks exclude, a full disk is told apart."""

import contextlib
import os

import pytest

from rvq_jax import io


def test_the_reason_is_found_at_the_bottom_of_a_chain():
  try:
    try:
      raise OSError(28, 'No space left on device')
    except OSError as error:
      raise RuntimeError('the save failed') from error
  except RuntimeError as error:
    assert io.full_disk_reason(error) == 'No space left'
  text = 'RESOURCE_EXHAUSTED: ... [OS error 28: ENOSPC No space left on device]'
  assert io.full_disk_reason(ValueError(text)) == 'No space left'
  assert io.full_disk_reason(ValueError('no such file')) is None


def test_other_errors_pass_as_they_are(tmp_path):
  with pytest.raises(KeyError), io.explain_full_disk(tmp_path, 'try again'):
    raise KeyError('x')


def test_a_file_holds_the_old_or_the_new_content(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  io.write_atomic(path, 'old')

  def fail(descriptor):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fail)
    with contextlib.suppress(OSError):
      io.write_atomic(path, 'new')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_a_lock_excludes_others_and_makes_its_folder(tmp_path):
  path = tmp_path / 'runs' / 'a' / '.lock'
  with io.lock(path, 'runs/a', 'give another --workdir'):
    with pytest.raises(ValueError, match='runs/a is in use by .* give another'):
      with io.lock(path, 'runs/a', 'give another --workdir'):
        pass
  with io.lock(path, 'runs/a', ''), io.lock(tmp_path, 'a folder', ''):
    pass  # free again; another lock is another
  with pytest.raises(ValueError, match='cannot make the folder .*lock/b'):
    with io.lock(path / 'b' / '.lock', 'b', 'give another --workdir'):
      pass
