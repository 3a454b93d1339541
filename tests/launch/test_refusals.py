"""A wrong command ends in one line and exit code 2, and writes nothing."""

import os
import pwd
import re

import pytest

from rvq_jax.cli import COMMANDS
from rvq_jax.commands import program
from rvq_jax.training import backend

MINE = """
from rvq_jax.configs import photos

def get_config():
  raise ValueError(f'mine, of {photos.get_config().num_steps} steps')
"""
FILES = {
  'mine.py': MINE,
  'empty.py': '',
  'needs.py': 'def get_config(variant):\n  pass',
  'broken.py': 'x = nothing',
  'mine.npz': 'mine',
  'mine.png': 'mine',
  'photos': 'x = nothing',
}
PHOTOS = 'train --config=photos'
SETS = f'{PHOTOS} --config'
EITHER = 'expected --workdir=DIR and either'
FLAGS = [
  ('train', 'NAME is one of cifar10, imagenet, imagenet_vqgan, photos'),
  ('train --config=none', "vqgan, photos, photos_vqgan; got 'none'"),
  ('train --config=configs/photos.py', "; got 'configs/photos.py'"),
  ('train --config=__init__', "; got '__init__'"),
  ('train --config.batch_size=8', '; got none'),
  ('train --config=cifar10:f5', ':f4, :best, :f4,best or :multiscale, got :f5'),
  (f'{PHOTOS}:f5', 'this config has no variants: expected --config=NAME with'),
  ('train --config=needs.py', 'this config needs a variant: expected --con'),
  ('train --config=empty.py', 'the config file does not define get_config()'),
  ('train --config=broken.py', "broken.py: NameError: name 'nothing' is not"),
  ('train --config=mine.py', 'mine, of 1000 steps'),
  ('train --config={tmp}/mine.py', 'mine, of 1000 steps'),
  ('train --config=~/mine.py', 'mine, of 1000 steps'),
  # These configs are there: what is typed behind them is at fault.
  (f'{SETS}.batch_size=a', "--config.batch_size=a: expected an integer, got '"),
  (f'{SETS}.batch_size a', "--config.batch_size=a: expected an integer, got '"),
  (f'{SETS}.model.decay=a', "--config.model.decay=a: expected a number, got '"),
  (f'{SETS}.model.remat=a', "remat=a: expected true or false, got 'a'"),
  (
    f'{SETS}.bach_size=1',
    "'config.bach_size'. Did you mean: config.batch_size ?",
  ),
  (f'{SETS}.model.codbook_size=1', 'Did you mean: config.model.codebook_size'),
  (
    'train --config imagenet --config.a=1',
    "Unknown command line flag 'config.a'",
  ),
  (
    'train --config=cifar10:f4,best --config.a=1',
    "Unknown command line flag 'config.a'",
  ),
  (f'{PHOTOS} stray', "expected only flags (--name=value), got 'stray'"),
  (f'{PHOTOS} --wrkdir=x', "flag 'wrkdir'. Did you mean: workdir ?"),
  (f'{PHOTOS} --workdir', 'Missing value for flag --workdir'),
  (f'{PHOTOS} --multihost=a', "--multihost=a: expected true or false, got 'a'"),
  (f'{PHOTOS} --init=x --workdir=x', 'another folder than --workdir=x'),
  ('reproduce', 'expected --config=NAME'),
  ('reproduce --config=photos --table=34', "7, all or objectives, got '34'"),
  ('reproduce --config=photos --seeds=0', "an integer from 1 up, got '0'"),
  ('reproduce --config=photos --num_steps=-3', 'an integer from 1 up, got '),
  ('evaluate', 'expected --workdir=DIR, the directory of a run'),
  ('evaluate --workdir=x --step=last', "expected a number or best, got 'last'"),
  ('export', 'expected --workdir=DIR and --output=FOLDER'),
  ('export --ouput=x', "flag 'ouput'. Did you mean: output ?"),
  ('export --workdir=x', 'expected --workdir=DIR and --output=FOLDER'),
  ('explore', 'expected --workdir=DIR, of a run or an export'),
  ('explore --workdir=x --images=0', '--images=0: expected an integer from 1'),
  ('encode', f'{EITHER} IMAGE FILE.npz'),
  ('encode --workdir=x mine.png', "an output FILE.npz, got ''"),
  ('encode --workdir=x mine.png y.jpg', "an output FILE.npz, got 'y.jpg'"),
  ('encode --workdir=x mine.png mine.npz', 'mine.npz exists and is not over'),
  ('encode --workdir=x --input={tmp}', EITHER),
  ('encode --workdir=x --input={tmp} --output=y z', EITHER),
  ('encode --workdir=x phto.jpg y.npz', 'an image file, got phto.jpg'),
  ('encode --workdir=x ~/no.jpg y.npz', 'an image file, got {tmp}/no.jpg'),
  ('encode --workdir=x a b c', 'at most 2 paths and flags'),
  ('encode --workdir=x --image_size=0', '--image_size=0: expected an integer'),
  ('decode', f'{EITHER} FILE.npz IMAGE.png'),
  ('decode --workdir=x mine.npz', "an output FILE.png, got ''"),
  ('decode --workdir=x --input={tmp} --output=y z', EITHER),
  ('decode --workdir=x mine.npz y.jpg', "an output FILE.png, got 'y.jpg'"),
  ('decode --workdir=x mine.npz mine.png', 'mine.png exists and is not over'),
]
VALUES = [
  (f'{PHOTOS} --process_id=0', 'expected --multihost too'),
  (f'{PHOTOS} --multihost --process_id=0', 'of them, got None, None, 0'),
  (f'{SETS}.model.codebook_size=-5', 'codebook_size: expected at least 1, got'),
  (f'{SETS}.data.name=folder:/no/where', '/no/where'),
  (f'{SETS}.freeze=x', "config.freeze: expected one of '', codes, 'encoder,"),
  ('evaluate --workdir=/no/where', 'a run with checkpoints in /no/where'),
  ('evaluate --workdir=~/x', 'found neither; .* --workdir={tmp}/x'),
  ('export --workdir=/no --output={tmp}/x', 'a run with checkpoints'),
  ('export --workdir=/no --output={tmp}', 'a new or empty folder'),
  ('encode --workdir={tmp} {png} y.npz', 'a run with checkpoints'),
  ('encode --workdir=x --input=~/no --output=~/new', 'no {tmp}/no: exp'),
  ('encode --workdir=x --input={images} --output=y --split=s', 'split: ex'),
  ('explore --workdir=x --output={tmp}/x.html', 'a run with checkpoints'),
  ('explore --workdir=x --output=mine.png', 'not a page of the explorer'),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
  """Returns a function: a command -> the line that it ends in."""
  monkeypatch.setattr(program, '_prepare_logs', lambda: None)
  monkeypatch.setattr(backend, 'prepare_backend', lambda **_: None)
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)

  def end(command):
    name, *arguments = command.split()
    with pytest.raises(SystemExit) as ended:
      COMMANDS[name].main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == '' and line.startswith('error: ')
    assert {path.name for path in tmp_path.glob('[!._]*')} == set(FILES)
    assert (tmp_path / 'mine.npz').read_text() == FILES['mine.npz']
    return line

  return end


@pytest.mark.parametrize(('command', 'message'), FLAGS)
def test_a_wrong_flag_is_named(
  command, message, refused, tmp_path, monkeypatch
):
  monkeypatch.setattr(backend, 'prepare_backend', pytest.fail)
  line = refused(command.format(tmp=tmp_path))
  assert message.format(tmp=tmp_path) in line


@pytest.mark.parametrize(('command', 'message'), VALUES)
def test_a_wrong_value_is_named(
  command, message, refused, tmp_path, image_folder
):
  png = next(image_folder.rglob('*.png'))
  names = {'tmp': tmp_path, 'png': png, 'images': image_folder}
  line = refused(command.format(**names))
  pattern = message.format(**names)
  assert re.search(pattern, line), line


def test_a_user_without_a_home_is_told(refused, monkeypatch):
  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  monkeypatch.delenv('HOME')
  line = refused('evaluate --workdir=~/x')
  assert 'a whole path, for there is no home directory' in line


@pytest.mark.parametrize('command', COMMANDS)
def test_rvq_and_the_launcher_refuse_alike(command, run, rvq, tmp_path):
  call = {'export': ['--workdir=/no', '--output=x']}.get(command, [])
  typed = rvq(command, *call, cwd=tmp_path)
  launcher = {'train': 'main'}.get(command, command)
  for done in (typed, run(launcher, *call, cwd=tmp_path)):
    assert (done.returncode, done.stdout) == (2, ''), done
    assert done.stderr == typed.stderr and len(done.stderr.splitlines()) == 1
  assert os.listdir(tmp_path) == []


def test_an_unknown_command_is_named(rvq, tmp_path):
  done = rvq('tain', cwd=tmp_path)
  message = f"expected rvq {', '.join(COMMANDS)} or --help, got 'tain'"
  assert (done.returncode, done.stderr) == (2, f'error: {message}\n')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--multihost', 'expected a scheduler such as SLURM, found none'),
    ('--init=/no', 'expected a run with checkpoints in /no, or an export'),
  ],
)
def test_a_run_that_cannot_start_ends_in_one_line(flag, message, rvq, tmp_path):
  arguments = ('--config=photos', '--config.model.quantize_after=0', flag)
  done = rvq('train', *arguments, cwd=tmp_path)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert message in done.stderr
