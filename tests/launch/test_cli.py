"""The command `rvq`, typed in a folder that is no checkout."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rvq_jax import __version__
from rvq_jax.cli import COMMANDS, config_names

ROOT = Path(__file__).resolve().parents[2]
RVQ = 'from rvq_jax.cli import main; main()'
MINE = """
from rvq_jax.configs import photos

def get_config():
  raise ValueError(f'mine, of {photos.get_config().num_steps} steps')
"""


def rvq(cwd, *arguments, program=RVQ):
  done = subprocess.run(
    [sys.executable, '-c', program, *arguments],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=280,
  )
  return done.returncode, done.stdout, done.stderr


def test_pip_installs_the_command():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert project['scripts'] == {'rvq': 'rvq_jax.cli:main'}


@pytest.mark.parametrize('arguments', [(), ('--help',)])
def test_help_lists_commands_and_configs_without_jax(arguments, tmp_path):
  program = f"""{RVQ}; import sys; assert 'jax' not in sys.modules"""
  code, out, err = rvq(tmp_path, *arguments, program=program)
  assert code == 0, err
  for command, launcher in COMMANDS.items():
    tree = ast.parse((ROOT / f'launch/{launcher}.py').read_text())
    line = ast.get_docstring(tree).splitlines()[0]
    assert f'{command:<10} {line}\n' in out
  shipped = sorted(path.stem for path in (ROOT / 'configs').glob('[!_]*.py'))
  assert config_names() == shipped and ', '.join(shipped) in out


def test_each_launcher_is_a_command():
  names = {path.stem for path in (ROOT / 'launch').glob('*.py')}
  assert set(COMMANDS.values()) == names - {'command_line', 'processes'}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('tain', f"expected rvq {', '.join(COMMANDS)} or --help, got 'tain'"),
    ('train', 'NAME is one of cifar10, imagenet, imagenet_vqgan, photos'),
    ('train --config=none', "vqgan, photos, photos_vqgan; got 'none'"),
    ('train --config=configs/photos.py', "; got 'configs/photos.py'"),
    ('train --config=__init__', "; got '__init__'"),
    ('train --config=cifar10:f5', 'or :multiscale, got :f5'),
    ('train --config=photos:f5', 'this config has no variants: expected --c'),
    ('train --config=needs.py', 'this config needs a variant: expected --con'),
    ('train --config=empty.py', 'the config file does not define get_config()'),
    ('train --config=photos --config.batch_size=a', "an integer, got 'a'"),
    ('train --config=photos --config.model.decay=a', "a number, got 'a'"),
    # These configs were found: what is behind them is at fault.
    ('train --config=photos --config.a=1', 'the config has no field a'),
    ('train --config imagenet --config.a=1', 'the config has no field a'),
    ('train --config=cifar10:f4,best --config.a=1', 'has no field a'),
    ('train --config=mine.py', 'mine, of 1000 steps'),
    ('train --config={tmp}/mine.py', 'mine, of 1000 steps'),
    ('train --config=~/mine.py', 'mine, of 1000 steps'),
    ('reproduce --config=photos --seeds=0', '--seeds: expected at least 1'),
    ('evaluate', 'expected --workdir=DIR, the directory of a run'),
    ('encode', 'expected --workdir=DIR and either IMAGE FILE.npz'),
    ('decode', 'expected --workdir=DIR and either FILE.npz IMAGE.png'),
    ('export', 'expected --workdir=DIR and --output=FOLDER'),
    ('explore', 'expected --workdir=DIR, of a run or an export'),
  ],
)
def test_a_wrong_command_ends_in_one_line(
  arguments, message, tmp_path, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text(MINE)
  (tmp_path / 'empty.py').write_text('')
  (tmp_path / 'needs.py').write_text('def get_config(variant):\n  pass')
  code, _, err = rvq(tmp_path, *arguments.format(tmp=tmp_path).split())
  assert code == 2, err
  assert message in err and len(err.splitlines()) == 1, err
  assert {path.name for path in tmp_path.iterdir()} <= {
    'mine.py',
    'empty.py',
    'needs.py',
    '__pycache__',
  }


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_a_commands_help_is_that_of_its_launcher(flag, tmp_path):
  _, out, err = rvq(tmp_path, 'train', flag)
  assert '\nrvq train --config' in out and '--workdir' in out, err
  assert 'launch/main.py --' not in out


def test_it_tells_its_version(tmp_path):
  assert rvq(tmp_path, '--version') == (0, f'rvq_jax {__version__}\n', '')


def test_what_libraries_log_of_their_files_is_left_out(tmp_path):
  program = """
import logging
from rvq_jax import cli
def main():
  logging.getLogger('matplotlib.font_manager').info('generated new fontManager')
  logging.info('ours')
cli.run(main)
"""
  code, _, err = rvq(tmp_path, program=program)
  assert code == 0 and err.endswith(' ours\n') and len(err.splitlines()) == 1


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_nobody_reads_on_ends_without_a_traceback(unbuffered):
  program = """
import sys
from rvq_jax import cli
def main():
  sys.stdin.read()
  print('made')
cli.run(main)
"""
  with subprocess.Popen(
    [sys.executable, '-c', program],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': unbuffered},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  ) as process:
    process.stdout.close()
    _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (1, b'')
