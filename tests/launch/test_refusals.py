"""A wrong command ends in one line and exit code 2, and writes nothing."""

import functools
import os
import pwd
import sys
from pathlib import Path

import pytest
from errors import one_line

from rvq_jax import io, load
from rvq_jax.cli import COMMANDS
from rvq_jax.commands import program
from rvq_jax.data.datasets import open_dataset
from rvq_jax.training import backend
from rvq_jax.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
RVQ = 'from rvq_jax.cli import main; main()'
FILES = {
  'mine.py': 'def get_config():\n  raise ValueError("a fault of mine")',
  'empty.py': '',
  'needs.py': 'def get_config(variant):\n  pass',
  'broken.py': 'x = nothing',
  'mine.npz': 'mine',
  'mine.png': 'mine',
  'photos': 'x = nothing',
  'near.py': 'from rvq_jax.configs import photos\ndef get_config():\n'
  '  return photos.get_config()["batch_sise"]',
}
PHOTOS = 'train --config=photos'
SETS = f'{PHOTOS} --config'
EITHER = 'expected --workdir=DIR, and'
FLAGS = [
  (
    'train',
    'NAME is one of cifar10, imagenet, imagenet_f16, imagenet_vqgan, photos',
  ),
  ('train --config=none', "photos, photos_vqgan, tiny_imagenet; got 'none'"),
  ('train --config=configs/photos.py', "; got 'configs/photos.py'"),
  ('train --config=__init__', "; got '__init__'"),
  ('train --config.batch_size=8', '; got none'),
  ('train --config=cifar10:f5', ':f4, :best, :f4,best or :multiscale, got :f5'),
  (f'{PHOTOS}:f5', 'photos: expected --config=NAME without a colon'),
  ('train --config=needs.py', 'needs.py: expected --config=NAME:VARIANT'),
  ('train --config=empty.py', 'empty.py: expected a function get_config'),
  ('train --config=broken.py', "broken.py: NameError: name 'nothing' is not"),
  ('train --config=mine.py', 'a fault of mine'),
  ('train --config={tmp}/mine.py', 'a fault of mine'),
  ('train --config=~/mine.py', 'a fault of mine'),
  # These configs are there: what is typed behind them is at fault.
  (f'{SETS}.batch_size=a', "batch_size=a: expected an integer, got 'a'"),
  (f'{SETS}.batch_size a', "batch_size=a: expected an integer, got 'a'"),
  (f'{SETS}.model.decay=a', ".decay=a: expected a number, got 'a'"),
  (f'{SETS}.model.remat=a', ".remat=a: expected true or false, got 'a'"),
  *(
    (f'{SETS}.model.widths={x}', f"{x}: expected integers, as (64,), got '{x}'")
    for x in ('32', 'a', '{{32:1}}')
  ),
  (f'{SETS}.model.widths.x=3', '--config.model.widths.x=3: no such field'),
  (f'{SETS}.model.widths[0]=3', "widths[0]=3': no such field"),
  ('train --config=near.py', """KeyError: 'batch_sise' Did you mean "batch_"""),
  (f'{SETS}.modl.remat=a', """'modl' Did you mean "model" instead"""),
  (f'{SETS}.batch_size.x=a', 'Attempting to lookup: batch_size.x'),
  (f'{PHOTOS} stray', "expected only flags (--name=value), got 'stray'"),
  (f'{PHOTOS} --wrkdir=x', "flag 'wrkdir'. Did you mean: workdir ?"),
  (f'{PHOTOS} --workdir', 'Missing value for flag --workdir'),
  (f'{PHOTOS} --multihost=a', "--multihost=a: expected true or false, got 'a'"),
  (f'{PHOTOS} --init=x --workdir=x', 'a folder other than --workdir=x'),
  ('reproduce', 'expected --config=NAME'),
  ('reproduce --config=photos --table=34', '<all|objectives|3|4|5|6|7>'),
  (
    'reproduce --config=photos --seeds=0',
    "integer, at least 1, got '0'",
  ),
  (
    'reproduce --config=photos --num_steps=-3',
    "at least 1, got '-3'",
  ),
  ('evaluate', 'expected --workdir=DIR, the directory of a run'),
  ('evaluate --workdir=x --step=last', "expected a number or best, got 'last'"),
  ('export', 'expected --workdir=DIR and --output=FOLDER'),
  ('export --workdir=x', 'expected --workdir=DIR and --output=FOLDER'),
  ('explore', 'expected --workdir=DIR, of a run or an export'),
  ('benchmark', 'expected one of cifar10, imagenet, imagenet_f16, '),
  ('benchmark', 'an export, pretrained:NAME or hf:OWNER/NAME, got none'),
  ('benchmark cifar01:f4', 'got cifar01:f4'),
  ('benchmark photos {tmp}', 'got photos and {tmp}'),
  ('benchmark --workdir={tmp} {tmp}', 'got {tmp} and {tmp}'),
  ('benchmark {tmp} --config.batch_size=8', "flag 'config.batch_size'"),
  ('benchmark photos --peak=nan', 'expected TFLOP/s, such as 989, got nan'),
  ('benchmark photos --steps=0', "integer, at least 1, got '0'"),
  ('explore --workdir=x --images=0', "integer, at least 1, got '0'"),
  (
    'encode --workdir=x --image_size=0',
    "integer, at least 1, got '0'",
  ),
  ('encode', f'{EITHER} IMAGE FILE.npz or --input=DIR --output=DIR'),
  ('encode --workdir=x mine.png', EITHER),
  ('encode --workdir=x mine.png y.jpg', "an output FILE.npz, got 'y.jpg'"),
  ('encode --workdir=x mine.png mine.npz', 'mine.npz exists and is not over'),
  ('encode --workdir=x --input={tmp}', EITHER),
  ('encode --workdir=x --input={tmp} --output=y z', EITHER),
  ('encode --workdir=x phto.jpg y.npz', 'an image file, got phto.jpg'),
  ('encode --workdir=x ~/no.jpg y.npz', 'an image file, got {tmp}/no.jpg'),
  ('encode --workdir=x a b c', EITHER),
  ('decode', f'{EITHER} FILE.npz IMAGE.png or'),
  ('decode --workdir=x mine.npz y.jpg', "an output FILE.png, got 'y.jpg'"),
  ('decode --workdir=x mine.npz mine.png', 'mine.png exists and is not over'),
]
VALUES = [
  (f'{SETS}.bach_size=1', 'no such field; did you mean config.batch_size?'),
  (f'{SETS}.model.codbook_size=1', 'did you mean config.model.codebook_size?'),
  ('train --config imagenet --config.a=1', 'config.a: no such field'),
  ('reproduce --config=cifar10:f4,best --config.a=1', 'a: no such field'),
  (f'{PHOTOS} --process_id=0', 'need --multihost: add it'),
  (f'{PHOTOS} --multihost --process_id=0', 'or none, got None, None, 0'),
  (f'{SETS}.model.codebook_size=-5', 'codebook_size: expected at least 1, got'),
  (f'{SETS}.data.name=folder:/no/where', '/no/where'),
  (f'{SETS}.freeze=x', "config.freeze: expected one of '', codes, encoder, 'e"),
  ('evaluate --workdir=/no/where', 'a run with checkpoints in /no/where'),
  ('evaluate --workdir=~/x', '--workdir={tmp}/x'),
  ('export --workdir=/no --output={tmp}/x', 'a run with checkpoints'),
  ('export --workdir=/no --output={tmp}', 'a new or empty folder'),
  ('encode --workdir={tmp} {png} y.npz', 'a run with checkpoints'),
  ('encode --workdir=x --input=~/no --output=~/new', 'no {tmp}/no: exp'),
  ('encode --workdir=x --input={images} --output=y --split=s', 'split: ex'),
  (
    'encode --workdir=x --input={images} --output={images}/y',
    'expected --output outside the images in {images}, got {images}/y',
  ),
  ('encode --workdir={tmp} {png} no/y.npz', 'no/y.npz: there is no folder no'),
  ('decode --workdir={tmp} mine.npz no/y.png', 'there is no folder no'),
  ('reproduce --config=photos --workdir=.', '--workdir: expected a new or'),
  ('train --config=photos --workdir=.', '--workdir: expected a new or empty'),
  ('benchmark {tmp}', 'expected a run with checkpoints in {tmp}'),
  ('benchmark photos --config.batch_sise=8', 'did you mean config.batch_size?'),
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


@pytest.mark.parametrize(('command', 'message'), FLAGS + VALUES)
def test_a_wrong_flag_or_value_is_named(
  command, message, refused, tmp_path, image_folder, monkeypatch
):
  if (command, message) in FLAGS:  # before JAX is prepared
    monkeypatch.setattr(backend, 'prepare_backend', pytest.fail)
  png = next(image_folder.rglob('*.png'))
  names = {'tmp': tmp_path, 'png': png, 'images': image_folder}
  assert message.format(**names) in refused(command.format(**names))


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('argument', ['--workdir=gs://b/x', 's3://b/x'])
def test_a_bucket_is_refused(command, argument, refused):
  line = refused(f'{command} {argument}')
  assert line.startswith(f'error: {argument}: expected a local path; copy')


def test_the_library_refuses_a_bucket(tiny_config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bucket = 'gs://b/x'
  for call in (
    lambda: load(bucket),
    lambda: train(tiny_config, bucket),
    lambda: io.check_folder(bucket),
    lambda: io.check_file(Path(bucket)),
    lambda: open_dataset('tfds:cifar10', data_dir=bucket),
  ):
    with one_line('expected a local path, got gs:/+b/x'):
      call()
  assert not list(tmp_path.iterdir())


READ = {
  'open(file + "/x")': '{file}/x: Not a directory',
  'pathlib.Path(file).mkdir()': '{file}: File exists',
  'PIL.Image.open(file)': 'cannot identify image file',
  'json.loads("{{")': 'Expecting property name',
  'numpy.load(file)': 'pickled',
  'os.rename(file, file + "/x")': '{file}: {file}/x: Not a directory',
  'numpy.stack([])': None,  # a fault of ours
  '[][0]': None,
}


@pytest.mark.parametrize('call', READ)
def test_what_the_machine_denies_is_one_line_and_a_fault_is_not(
  call, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(program, '_prepare_logs', lambda: None)
  (tmp_path / 'file').write_text('no image')
  names = {'__name__': 'rvq_jax.x', 'file': str(tmp_path / 'file')}
  exec('import json, os, pathlib, numpy, PIL.Image', names)
  run = functools.partial(eval, call.replace('{{', '{'), names)
  kind = SystemExit if READ[call] else (ValueError, IndexError)
  with pytest.raises(kind):
    program._run(lambda _: run(), None, ())
  lines = capsys.readouterr().err.splitlines()
  if READ[call]:
    assert len(lines) == 1 and lines[0].startswith('error: ')
    assert READ[call].format(file=tmp_path / 'file') in lines[0]
  else:
    assert not lines


@pytest.mark.parametrize(
  ('output', 'code', 'message'),
  [('>&-', 0, ''), ('>/dev/full', 2, 'error: No space left on device\n')],
)
@pytest.mark.parametrize('arguments', ['--help', 'encode --help'])
def test_a_closed_or_full_output_and_no_docstrings(
  output, code, message, arguments, one_device_python, tmp_path
):
  script = tmp_path / 'rvq.sh'
  script.write_text(
    f'{sys.executable} -OO -c "{RVQ}" {arguments} {output}\nexit $?'
  )
  shell = f'import subprocess; exit(subprocess.call(["sh", {str(script)!r}]))'
  done = one_device_python(shell, PYTHONPATH=str(ROOT))
  assert (done.returncode, done.stderr) == (code, message)


def test_a_user_without_a_home_is_told(refused, monkeypatch):
  monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)  # KeyError
  monkeypatch.delenv('HOME')
  line = refused('evaluate --workdir=~/x')
  assert 'no home directory: expected a full path' in line


@pytest.mark.parametrize('command', COMMANDS)
def test_rvq_and_the_launcher_refuse_alike(command, run, rvq, tmp_path):
  call = {'export': ['--workdir=/no', '--output=x']}.get(command, [])
  typed = rvq(command, *call, cwd=tmp_path)
  main = Path(__file__).parents[2] / 'launch/main.py'
  launcher = {'train': 'main'}.get(command, command)
  for done in (typed, run(launcher, *call, cwd=tmp_path)):
    assert (done.returncode, done.stdout) == (2, ''), done
    assert len(done.stderr.splitlines()) == 1
    # Each names a command as it was started itself.
    assert ('rvq train' in done.stderr) == (done is typed and call != [])
    assert done.stderr.replace(f'python {main}', 'rvq train') == typed.stderr
  assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize('started', ['rvq', 'launch'])
def test_a_message_names_commands_as_they_were_started(
  started, run, rvq, tmp_path
):
  call = 'evaluate', '--workdir=my run'
  done = (rvq if started == 'rvq' else run)(*call, cwd=tmp_path)
  launcher = Path(__file__).parents[2] / 'launch/main.py'
  train = {'rvq': 'rvq train', 'launch': f'python {launcher}'}[started]
  [line] = done.stderr.splitlines()
  assert line.endswith(f"with {train} --config=NAME '--workdir=my run'")


def test_an_unknown_command_is_named(rvq, tmp_path):
  done = rvq('tain', cwd=tmp_path)
  names = 'train, evaluate, encode, decode, import, export, explore, '
  names += 'reproduce, benchmark'
  message = f"error: expected rvq {names} or --help, got 'tain'\n"
  assert (done.returncode, done.stderr) == (2, message)


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
