"""export and explore as a person runs them: in a process of their own."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rvq_jax import load

ROOT = Path(__file__).resolve().parents[2]


def start(launcher, *arguments, cwd=ROOT):
  return subprocess.Popen(
    [sys.executable, ROOT / f'launch/{launcher}.py', *map(str, arguments)],
    cwd=cwd,
    env=os.environ | {'XLA_FLAGS': ''},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(launcher, *arguments, **options):
  process = start(launcher, *arguments, **options)
  out, err = process.communicate(timeout=280)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['export'], 'expected --workdir=DIR and --output=FOLDER'),
    (['export', '--workdir=/no', '--output={tmp}/x'], 'a run with checkpoints'),
    (['export', '--workdir=/no', '--output={tmp}'], 'a new or empty folder'),
    (['explore'], 'expected --workdir=DIR, of a run or an export'),
    (['explore', '--workdir=/no', '--images=0'], 'at least 1, got 0'),
    (['explore', '--workdir=/no'], 'a run with checkpoints'),
  ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(
  arguments, message, tmp_path
):
  (tmp_path / 'mine.txt').write_text('mine')
  code, _, err = run(*(a.format(tmp=tmp_path) for a in arguments))
  assert code == 2, err
  assert message in err and len(err.splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


@pytest.mark.slow
def test_a_run_is_exported_and_the_export_explored(
  tiny_run, image_folder, tmp_path
):
  workdir, folder = tiny_run, tmp_path / 'export'
  code, out, err = run('export', f'--workdir={workdir}', f'--output={folder}')
  assert code == 0, err
  assert 'README.md, config.json, model.safetensors' in out
  assert load(folder).model_hash == load(workdir).model_hash
  page = tmp_path / 'page.html'
  source = image_folder / 'test'
  code, out, err = run(
    'explore',
    f'--workdir={folder}',
    f'--output={page}',
    f'--input={source}',
    '--images=3',
  )
  assert code == 0, err
  assert '3 images' in out and page.read_text().startswith('<!doctype html>')
  # Without --input there is nothing that it could show.
  code, out, err = run('explore', f'--workdir={folder}', cwd=tmp_path)
  assert code == 2 and len(err.splitlines()) == 1
  assert 'is an export and holds no data: give --input=IMAGE' in err


@pytest.mark.slow
def test_the_page_of_the_current_directory_bears_its_name(tiny_run, tmp_path):
  page = tmp_path / 'page.html'
  flags = ('--workdir=.', f'--output={page}', '--images=1')
  code, _, err = run('explore', *flags, cwd=tiny_run)
  assert code == 0, err
  assert '"name": "run", "step": 6' in page.read_text()


@pytest.mark.slow
def test_the_page_of_a_run_is_served_until_ctrl_c(tiny_run):
  process = start('explore', f'--workdir={tiny_run}', '--serve', '--port=0')
  try:
    line = next(line for line in process.stderr if 'http://' in line)
    address = line.split()[1].rstrip(';')
    with urllib.request.urlopen(address, timeout=60) as answer:
      assert b'<!doctype html>' in answer.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
    process.communicate()
  assert process.returncode == 0 and 'Traceback' not in err
