"""Files are whole or absent, locks exclude, a full disk is told apart."""

import functools
import os

import pytest
from errors import one_line

from rvq_jax import io


def test_the_reason_is_found_at_the_bottom_of_a_chain():
  error = RuntimeError('the save failed')
  error.__cause__ = OSError(28, 'the disk')
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

  monkeypatch.setattr(os, 'fsync', lambda _: os.stat('/no/file'))
  with pytest.raises(FileNotFoundError):
    io.write_atomic(path, 'new')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
  path = tmp_path / 'none' / 'x.npz'
  with one_line(f"No such file or directory: '{path}'$", FileNotFoundError):
    io.write_atomic(path, 'new')


def test_a_lock_excludes_others_and_makes_its_folder(tmp_path):
  path = tmp_path / 'runs' / 'a' / '.lock'
  lock = functools.partial(io.lock, name='a', advice='give another --workdir')
  with lock(path), one_line('a is in use by .* give another'), lock(path):
    pass
  with lock(path), lock(tmp_path):
    pass  # free again; another lock is another
  with one_line('cannot make the folder .*lock/b'), lock(path / 'b' / '.lock'):
    pass


def test_a_folder_that_is_filled_is_held_and_an_empty_one_removed(tmp_path):
  folder, claim = tmp_path / 'a/b', functools.partial(io.claim, rest='.x-??')
  with claim(folder, 'go'), one_line('b is in use'), claim(folder, 'go'):
    pass
  assert not folder.exists()
  (folder / '.x-12/left').mkdir(parents=True)  # by a killed command
  with claim(folder, 'try again'):
    (folder / 'mine').touch()
  assert [path.name for path in folder.iterdir()] == ['mine']
  with one_line('expected a new or empty folder'), claim(folder, 'go'):
    pass


def test_a_full_disk_is_explained_once_by_the_folder_that_is_full(tmp_path):
  with (
    one_line(f'^No space left while writing to {tmp_path}/in', OSError),
    io.explain_full_disk(tmp_path, 'do this'),
    io.explain_full_disk(tmp_path / 'in', 'do that'),
  ):
    raise OSError(28, 'No space left on device')
