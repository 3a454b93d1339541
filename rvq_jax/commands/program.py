"""The frame of every command: its flags, help, logs and one-line errors."""

import faulthandler
import functools
import logging
import os
import select
import shlex
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from rvq_jax.commands import config_file

_PACKAGE = Path(__file__).resolve().parents[1]
_HELP = {'-h', '-help', '--help', '--helpfull', '--helpshort'}
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_NOISY = ('jax', 'orbax', 'tensorboardX', 'absl', 'asyncio', 'matplotlib')
_LOST = 75  # EX_TEMPFAIL: the same command resumes the run


class Parser(flags.ArgumentParser):
  """Parses by `convert`; an error says what is expected."""

  def __init__(self, convert, expected: str):
    self._convert, self._expected = convert, expected

  def parse(self, argument):
    """The value, or a ValueError."""
    try:
      return self._convert(argument)
    except (TypeError, ValueError) as error:
      reason = f'expected {self._expected}, got {argument!r}'
      raise ValueError(reason) from error


def _expand(text):
  """Replaces a leading ~, which shells leave in --name=~/value."""
  expanded = os.path.expanduser(text)
  if expanded == '~' or expanded.startswith('~/'):
    raise ValueError
  return expanded


def _step(text):
  return text if text == 'best' else flags.IntegerParser(0).parse(text)


TEXT = Parser(_expand, 'a whole path, for there is no home directory')
COUNT = Parser(flags.IntegerParser(1).parse, 'an integer from 1 up')
SWITCH = Parser(flags.BooleanParser().parse, 'true or false')
INTEGER = Parser(flags.IntegerParser().parse, 'an integer')
NUMBER = Parser(flags.FloatParser().parse, 'a number')
# For the fields of a config.
for _type, _parser in ((int, INTEGER), (float, NUMBER), (bool, SWITCH)):
  config_flags.register_flag_parser_for_type(_type, _parser)


class Flag(NamedTuple):
  """A flag of a command."""

  name: str
  help: str
  default: Any = None
  parser: Parser = TEXT


CONFIG = Flag(
  'config',
  'A name, as cifar10:f4, or the path of a config file; --config.FIELD=VALUE '
  'sets a field of it.',
)
MODEL = Flag('workdir', 'Run, export or hf:OWNER/NAME.')
DATA_DIR = Flag('data_dir', 'Folder of prepared tfds data.')
STEP = Flag(
  'step',
  'Saved step or best; default: the newest.',
  parser=Parser(_step, 'a number or best'),
)
PROCESSES = (
  Flag('multihost', 'Several processes make one run.', False, SWITCH),
  Flag('coordinator', 'HOST:PORT of process 0, without a scheduler.'),
  Flag('num_processes', 'With --coordinator.', parser=INTEGER),
  Flag('process_id', 'With --coordinator: this one, from 0.', parser=INTEGER),
  Flag('lost_after', 'Seconds of silence until one is lost.', 100, INTEGER),
)


def command(*options, paths: int = 0):
  """Makes main(arguments=None, program='') of a function main(flags, *paths).

  The docstring of its module is the help. Bad flags and errors that rvq_jax
  raises on purpose end in one line and exit code 2; the loss of another process
  or of a data worker in one line and exit code 75. A traceback means a fault in
  the program.

  Args:
    *options: its flags. `flags` holds their values, the `command` as it was
      typed, and with CONFIG the `run_name`, such as cifar10_f4.
    paths: largest number of arguments that are not flags.
  """
  return lambda function: functools.partial(_main, function, options, paths)


def _main(function, options, paths, arguments=None, program=''):
  arguments = sys.argv[1:] if arguments is None else arguments
  program = program or f'python {sys.argv[0]}'
  values = flags.FlagValues()  # absl's own would be shared by all commands
  for name, text, default, parser in options:
    switch, serializer = parser is SWITCH, flags.ArgumentSerializer()
    values[name] = flags.Flag(
      parser, serializer, name, default, text, boolean=switch
    )
  if _HELP.isdisjoint(arguments):
    given, rest = _read(values, arguments, paths)
    given.command = f'{program} {shlex.join(arguments)}'
    _run(function, given, rest)
  else:
    module = sys.modules[function.__module__]
    usual = f'rvq {module.__name__.rpartition(".")[2]} '
    print(module.__doc__.replace(usual, f'{program} '))
    print(values.get_help(include_special_flags=False))


def _read(values, arguments, paths):
  """Returns the values of the flags and the other arguments, or fails."""
  has_config, more = 'config' in values, {}
  try:
    _, *rest = values(['', *arguments], known_only=has_config)
    if has_config:
      config, more['run_name'] = config_file.load(values.config)
      del values.config  # the text makes room for the config and its fields
      config_file.check_fields(config, rest)
      config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=rest
      )
      _, *rest = values(['', *rest])
    rest = [TEXT.parse(path) for path in rest]
  except (flags.Error, ValueError) as error:
    fail(error)
  if len(rest) > paths:
    most = f'at most {paths} paths and ' if paths else 'only '
    fail(f'expected {most}flags (--name=value), got {" ".join(rest)!r}')
  return SimpleNamespace(**values.flag_values_dict() | more), rest


def _prepare_logs():
  faulthandler.enable()
  form = {'format': '%(asctime)s %(message)s', 'datefmt': '%H:%M:%S'}
  logging.basicConfig(**form, level=logging.INFO, force=True)
  for name in _NOISY:  # they log each file, and errors that they raise as well
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # TensorStore's threads answer a failed save after Orbax has closed its loop;
  # the main thread tells the cause.
  sys.unraisablehook = lambda args: (
    'Event loop is closed' in str(args.exc_value)
    or sys.__unraisablehook__(args)
  )


def _run(function, values, paths):
  """Runs a command; each way to end has its line and its exit code."""
  _prepare_logs()
  try:
    function(values, *paths)
    sys.stdout.flush()
  except KeyboardInterrupt:
    print('interrupted; what was finished is kept', file=sys.stderr)
    sys.stdout.flush()
    os._exit(130)  # at once: without waiting for threads that still save
  except Exception as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = _PACKAGE in Path(frame.filename).resolve().parents
    if isinstance(error, BrokenPipeError) and _output_is_closed():
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is buffered
      sys.exit(1)
    if ours and isinstance(error, _EXPECTED):
      fail(error, _LOST if isinstance(error, ChildProcessError) else 2)
    if _process() is None:
      raise
    from rvq_jax.training.multihost import peer_is_lost

    if peer_is_lost(error):
      fail(
        'another process of the run is gone or out of reach, see its log; the '
        'same command resumes from the last checkpoint '
        f'({str(error).splitlines()[0]})',
        _LOST,
      )
    traceback.print_exc()
    fail(error, 1)


def _output_is_closed():
  """Whether the reader, such as `head`, has ended."""
  poll = select.poll()
  poll.register(1, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def prepare_backend(flags, *, share_gpus: bool = False) -> None:
  """Prepares JAX; joins the other processes, of which only the first logs."""
  # Imported when the flags are known to be good: this takes seconds.
  from rvq_jax.training import backend, multihost

  backend.prepare_backend(share_gpus=share_gpus)
  if 'multihost' in vars(flags):
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if flags.multihost:
      multihost.initialize(*given, lost_after=flags.lost_after)
    elif given != (None, None, None):
      fail('--coordinator and the like: expected --multihost too')
    if not is_first():
      logging.getLogger().setLevel(logging.WARNING)


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


def check_usage(flags, paths, usage: str) -> None:
  """Ends the program unless two paths or --input and --output are given."""
  if not flags.workdir or bool(flags.input and flags.output) == bool(paths):
    fail(
      f'expected --workdir=DIR and either {usage}, or --input=FOLDER and '
      '--output=FOLDER'
    )


def check_new_file(path: str, suffix: str) -> None:
  """Ends the program unless `path` is a new file that ends in `suffix`."""
  if not path.endswith(suffix):
    fail(f'expected an output FILE{suffix}, got {path!r}')
  if os.path.lexists(path):
    fail(f'{path} exists and is not overwritten; name another output')
