"""The command `rvq`, and what it shares with the launchers.

That is flags, logging, the backend, one-line errors. `rvq train` is `python
launch/main.py`, `rvq evaluate` is `python launch/evaluate.py`, and so on: the
folders launch and configs are parts of the package (by a link in a checkout).
"""

import ast
import logging
import os
import re
import runpy
import select
import sys
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

PACKAGE = Path(__file__).resolve().parent
COMMANDS = {
  'train': 'main',
  'evaluate': 'evaluate',
  'encode': 'encode',
  'decode': 'decode',
  'export': 'export',
  'explore': 'explore',
  'reproduce': 'reproduce',
}
"""Command -> its launcher, launch/NAME.py."""
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_PATHS = ('workdir', 'init', 'input', 'output', 'data_dir', 'save_images')
_NOISY = ('jax', 'orbax', 'tensorboardX', 'absl', 'asyncio', 'matplotlib')
_LOST = 75  # EX_TEMPFAIL: the same command resumes the run


def _process() -> int | None:
  """This process of several, from 0; None for a single one."""
  jax = sys.modules.get('jax')
  several = jax is not None and jax.distributed.is_initialized()
  return jax.process_index() if several else None


def is_first() -> bool:
  """Whether this process prints for the run."""
  return not _process()


def fail(message, code: int = 2) -> None:
  """Ends the program: one line on standard error, and an exit code."""
  print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  if _process() is None:
    sys.exit(code)
  if is_first():
    time.sleep(5)  # the others abort when the first one ends: let them print
  sys.stderr.flush()
  os._exit(code)  # an orderly exit waits for the other processes


def config_names() -> list[str]:
  """The configs that come with the package."""
  names = sorted(path.stem for path in (PACKAGE / 'configs').glob('*.py'))
  return [name for name in names if not name.startswith('_')]


def config_name(flag) -> str:
  """NAME or NAME_VARIANT of the flag --config=NAME[:VARIANT]."""
  if not flag.present:
    _fail_without_config('none')
  path, _, variant = config_flags.get_config_filename(flag).partition(':')
  return Path(path).stem + (f'_{variant}' if variant else '').replace(',', '_')


def _fail_without_config(got):
  fail(
    'expected --config=NAME, or the path of a config file; NAME is one of '
    f'{", ".join(config_names())}; got {got}'
  )


def _config_path(given: str) -> str:
  """PATH[:VARIANT] of the value of --config; a file comes before a name."""
  name, colon, variant = given.partition(':')
  path = _expand(name)
  if not Path(path).is_file():
    if name not in config_names():
      _fail_without_config(repr(given))
    path = PACKAGE / 'configs' / f'{name}.py'
  return f'{path}{colon}{variant}'


def _with_config_path(argv: list[str]) -> list[str]:
  """argv with the path of the config in --config=NAME or --config NAME."""
  argv = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag in ('-config', '--config'):
      if equals:
        argv[i] = f'{flag}={_config_path(value)}'
      elif i + 1 < len(argv):
        argv[i + 1] = _config_path(argv[i + 1])
  return argv


def parse_step(step: str | None) -> int | str | None:
  """The value of a flag --step: a number, 'best' or None."""
  if step is not None and step != 'best' and not step.isdecimal():
    fail(f'--step: expected a number or best, got {step!r}')
  return int(step) if step and step != 'best' else step


def check_output(path: str, suffix: str) -> None:
  """Ends the program unless an output is a new file that ends in `suffix`."""
  if not path.endswith(suffix):
    fail(f'expected an output FILE{suffix}, got {path!r}')
  if os.path.lexists(path):
    fail(f'{path} exists and is not overwritten; name another output')


def prepare_backend(**options) -> None:
  """See `rvq_jax.training.backend`, which takes a moment to import."""
  from rvq_jax.training import backend

  backend.prepare_backend(**options)


def _expand(path: str) -> str:
  """Replaces a leading ~, which shells leave in --name=~/value."""
  expanded = os.path.expanduser(path)
  if expanded == '~' or expanded.startswith('~/'):
    fail(f'there is no home directory for {path}; give the whole path')
  return expanded


def _reason(error: Exception) -> str:
  """What flags raised, as a sentence."""
  text = str(error) or type(error).__name__
  if 'Traceback' in text:  # of a config file; the last line says why
    text = re.sub(r'^\w+Error: ', '', text.strip().splitlines()[-1])
  elif "no attribute 'get_config'" in text:
    return 'the config file does not define get_config()'
  elif isinstance(error, KeyError | AttributeError):
    return 'the config has no field ' + text.strip('\'"')
  if 'get_config() takes 0' in text:
    return 'this config has no variants: expected --config=NAME without a colon'
  if 'get_config() missing' in text:
    return 'this config needs a variant: expected --config=NAME:VARIANT'
  text = re.sub(
    'invalid literal for int.*: ', 'expected an integer, got ', text
  )
  text = re.sub('could not convert .*float: ', 'expected a number, got ', text)
  # Several arguments of an exception read as a tuple.
  return re.sub(r"\('(.*)', '(.*)'\)$", r"\1: '\2'", text)


def _parse(argv, positional):
  if 'config' in flags.FLAGS:
    argv = _with_config_path(argv)
  try:
    rest = flags.FLAGS(argv)
  except Exception as error:  # config_flags lets any exception through
    fail(_reason(error))
  if len(rest) > 1 + positional:
    more = f'at most {positional} paths and ' if positional else 'only '
    fail(f'expected {more}flags (--name=value), got {" ".join(rest[1:])!r}')
  for name in _PATHS:
    if name in flags.FLAGS and flags.FLAGS[name].value:
      flags.FLAGS[name].value = _expand(flags.FLAGS[name].value)
  return [rest[0], *map(_expand, rest[1:])]


def _output_is_closed() -> bool:
  """Whether the reader of standard output, such as `head`, has ended."""
  poll = select.poll()
  poll.register(1, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def run(main, *, positional: int = 0) -> None:
  """Runs main(*paths) as a program, with at most `positional` paths.

  Bad flags and errors that rvq_jax raises on purpose end in one line and exit
  code 2, the loss of another process or of a data worker in one line and exit
  code 75; a traceback means a fault in the program.
  """

  def guarded(argv):
    form = {'format': '%(asctime)s %(message)s', 'datefmt': '%H:%M:%S'}
    logging.basicConfig(**form, level=logging.INFO, force=True)
    # What libraries log of each file, and of errors that they raise anyway.
    for name in _NOISY:
      logging.getLogger(name).setLevel(logging.CRITICAL)
    # Of a thread that writes files: main fails with the cause.
    threading.excepthook = lambda args: (
      isinstance(args.exc_value, OSError) or threading.__excepthook__(args)
    )
    # Of TensorStore's threads, when they answer a save that has failed.
    sys.unraisablehook = lambda args: (
      'Event loop is closed' in str(args.exc_value)
      or sys.__unraisablehook__(args)
    )
    try:
      main(*argv[1:])
      sys.stdout.flush()
    except Exception as error:
      if isinstance(error, BrokenPipeError) and _output_is_closed():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered
        sys.exit(1)
      frame = traceback.extract_tb(error.__traceback__)[-1]
      ours = PACKAGE in Path(frame.filename).resolve().parents
      if isinstance(error, _EXPECTED) and ours:
        fail(error, _LOST if isinstance(error, ChildProcessError) else 2)
      if _process() is None:
        raise
      from rvq_jax.training.multihost import peer_is_lost

      if peer_is_lost(error):
        reason = str(error).splitlines()[0]
        fail(
          'another process of the run is gone or out of reach, see its log; '
          f'the same command resumes from the last checkpoint ({reason})',
          _LOST,
        )
      traceback.print_exc()
      fail(error, 1)
    except KeyboardInterrupt:
      print('interrupted; what was finished is kept', file=sys.stderr)
      sys.stdout.flush()
      os._exit(130)  # at once: without waiting for threads that still save

  program = sys.modules['__main__']
  if typed := getattr(program, 'TYPED', ''):  # else: python launch/NAME.py
    program.__doc__ = re.sub(r'python launch/\w+\.py', typed, program.__doc__)
  app.run(guarded, flags_parser=lambda argv: _parse(argv, positional))


def main() -> None:
  """Runs `rvq COMMAND ...`, which is `python launch/COMMAND.py ...`."""
  command, *rest = sys.argv[1:] or ['--help']
  if command in ('-h', '--help', 'help'):
    print(_overview())
    return
  if command == '--version':
    print(f'rvq_jax {version("rvq_jax")}')
    return
  if command not in COMMANDS:
    fail(f'expected rvq {", ".join(COMMANDS)} or --help, got {command!r}')
  path = _launcher(command)
  rest = ['--help' if argument == '-h' else argument for argument in rest]
  sys.argv = [str(path), *rest]
  sys.path.insert(0, str(path.parent))  # as Python does for a script
  runpy.run_path(str(path), {'TYPED': f'rvq {command}'}, '__main__')


def _launcher(command: str) -> Path:
  return PACKAGE / 'launch' / f'{COMMANDS[command]}.py'


def _overview() -> str:
  """What `rvq --help` prints; nothing that is imported for it takes long."""
  lines = ['rvq COMMAND [flags]; rvq COMMAND --help says which flags:', '']
  for command in COMMANDS:
    text = ast.get_docstring(ast.parse(_launcher(command).read_text()))
    lines.append(f'  {command:<10} {text.splitlines()[0]}')
  configs = f'Configs of train and reproduce: {", ".join(config_names())}.'
  return '\n'.join([*lines, '', configs])
