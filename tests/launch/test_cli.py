"""The command `rvq`: its help, its configs, and the launchers beside it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rvq_jax import __version__
from rvq_jax.cli import COMMANDS
from rvq_jax.commands import config_file, program

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / 'launch').glob('*.py'))


def test_each_launcher_is_a_command_and_defines_nothing():
  names = COMMANDS.keys() - {'train'} | {'main', 'checkout'}
  assert {path.stem for path in LAUNCHERS} == names
  assert not names & sys.stdlib_module_names  # they would hide those
  for path in LAUNCHERS:
    assert len(path.read_text().splitlines()) <= 8, path
    kinds = {type(node) for node in ast.walk(ast.parse(path.read_text()))}
    assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Assign}, path


WITHOUT_JAX = """
from rvq_jax.cli import main
main()
import sys
assert not {'jax', 'numpy'} & set(sys.modules)
"""


@pytest.fixture
def show(rvq, tmp_path):
  """Returns a function: arguments -> what `rvq` prints, without JAX."""

  def call(*arguments):
    done = rvq(*arguments, program=WITHOUT_JAX, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout

  return call


def test_help_lists_commands_and_configs(show):
  out = show('--help')
  assert show() == out
  for name, module in COMMANDS.items():
    assert f'{name:<10} {module.__doc__.splitlines()[0]}\n' in out
  shipped = sorted(path.stem for path in (ROOT / 'configs').glob('[!_]*.py'))
  assert ', '.join(shipped) in out


def test_the_module_is_the_command(run_python, show, tmp_path):
  done = run_python('-m', 'rvq_jax.cli', '--version', PYTHONPATH=str(ROOT))
  assert done.stdout == show('--version')


def test_the_help_of_a_command_has_its_flags(show):
  out = show('train', '--help')
  assert show('train', '-h') == out
  assert '\nrvq train --config=photos' in out
  assert '--workdir: ' in out and 'pdb' not in out


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_the_program_as_it_was_typed(command, capsys):
  typed = f'python here/{command}.py'
  COMMANDS[command].main(['--help'], typed)
  out, _ = capsys.readouterr()
  assert f'\n{typed} ' in out and f'\nrvq {command}' not in out


def test_it_tells_its_version(show):
  assert show('--version') == f'rvq_jax {__version__}\n'


@pytest.fixture
def read(monkeypatch):
  """Returns a function: arguments -> the flags that a command is given."""
  monkeypatch.setattr(program, '_prepare_logs', lambda: None)

  def call(*arguments):
    given = []
    program.command(program.CONFIG)(given.append)(arguments)
    return given[0]

  return call


@pytest.mark.parametrize(
  'given', ['cifar10:f4,best', str(ROOT / 'configs/cifar10.py:f4,best')]
)
def test_a_command_is_given_the_config_and_its_fields(given, read):
  flags = read(
    *('--config.batch_size=8', f'--config={given}', '--noconfig.data.flip'),
    *('--config.model.widths=(4,)', '--config.model.widths=4,8'),
    *('--config.num_steps', '3', '--config.model.sides=[1, 4]'),
  )
  config, model = flags.config, flags.config.model
  assert flags.run_name == 'cifar10_f4_best'
  assert (model.factor, model.estimator, model.widths) == (4, 'ste', (4, 8))
  assert (config.batch_size, config.num_steps) == (8, 3)
  assert model.sides == (1, 4)
  assert not config.data.flip


def test_a_shipped_config_given_by_its_path_is_not_a_second_module(monkeypatch):
  from rvq_jax.configs import photos

  monkeypatch.setattr(photos, 'get_config', lambda: {'seed': 7})
  paths = ROOT / 'configs/photos.py', ROOT / 'rvq_jax/configs/photos.py'
  for given in ('photos', *map(str, paths)):
    assert config_file.load(given)[0].to_dict() == {'seed': 7}


def test_a_config_of_the_user_builds_on_a_shipped_one(read, tmp_path):
  path = tmp_path / 'photos.py'
  path.write_text(
    'from rvq_jax.configs import photos\n'
    'def get_config(size):\n'
    '  config = photos.get_config()\n'
    '  config.data.image_size = int(size)\n'
    '  return config\n'
  )
  flags = read(f'--config={path}:32')
  assert flags.run_name == 'photos_32'
  assert (flags.config.data.image_size, flags.config.num_steps) == (32, 1000)


HOSTILE = """
import logging
from rvq_jax.commands import program
name = 'a\\x1b]0;x\\x07\\x9b31m\\u202e\\udce9\\x7f.png'
@program.command()
def main(flags):
  program.show(name)
  logging.info('skipped %s', name)
  program.fail(name)
main()
"""


def test_control_characters_of_a_name_are_escaped(rvq, tmp_path):
  done = rvq(program=HOSTILE, cwd=tmp_path)
  lines = (done.stdout + done.stderr).splitlines()
  assert len(lines) == 3 and all(map(str.isprintable, lines))
  name = r'a\x1b]0;x\x07\x9b31m\u202e\udce9\x7f.png'
  assert [line.endswith(name) for line in lines] == [True] * 3


def test_all_that_commands_print_is_escaped():
  for path in (ROOT / 'rvq_jax/commands').glob('*.py'):
    if path.stem != 'program':
      assert not re.search(r'(?<!\.)\bprint\(', path.read_text()), path


INTERRUPTED = """
from rvq_jax.commands import program
@program.command()
def main(flags):
  try:
    raise KeyboardInterrupt
  except KeyboardInterrupt as error:  # as a compiled module does
    raise ImportError('initializing the extension') from error
main()
"""


def test_an_interrupt_while_jax_is_imported_is_one_line(rvq, tmp_path):
  done = rvq(program=INTERRUPTED, cwd=tmp_path)
  assert done.stderr == 'interrupted; finished work is kept\n'
  assert done.returncode == 130


MAIN = """
import logging, sys
from rvq_jax.commands import program
@program.command()
def main(flags):
  logging.getLogger('matplotlib.font_manager').info('generated new fontManager')
  logging.info('ours')
  print('made')
sys.stdin.read()
main()
"""


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_nobody_reads_on_ends_without_a_traceback(unbuffered):
  # A print of the package.
  code = f'exec(compile({MAIN!r}, {program.__file__!r}, "exec"))'
  with subprocess.Popen(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': unbuffered},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    process.stdout.close()
    _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  [line] = err.splitlines()  # logs of libraries are left out
  assert line.endswith(' ours')
