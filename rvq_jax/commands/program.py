"""The frame of every command: flags, help, logs and one-line errors."""

import ast
import faulthandler
import functools
import logging
import os
import re
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
from rvq_jax.commands.parsers import Parser, StepParser, TupleParser
from rvq_jax.commands.shown import Formatter, shown

_HELP = {'-h', '-help', '--help', '--helpfull', '--helpshort'}
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_READERS = tuple('PIL numpy.lib codecs json pathlib shutil zipfile'.split())
_NOISY = ('jax', 'orbax', 'tensorboardX', 'absl', 'asyncio', 'matplotlib')
_LOST = 75  # EX_TEMPFAIL: the same command resumes the run


TEXT, SWITCH = (
  flags.ArgumentParser(),
  Parser(flags.BooleanParser(), 'true or false'),
)
INTEGER = Parser(flags.IntegerParser(), 'an integer')
COUNT = Parser(flags.IntegerParser(1), 'an integer, at least 1')
NUMBER = Parser(flags.FloatParser(), 'a number')
for _type, _parser in (
  *((int, INTEGER), (float, NUMBER), (bool, SWITCH)),
  (tuple, TupleParser()),
):
  config_flags.register_flag_parser_for_type(_type, _parser)  # in a config


class Flag(NamedTuple):
  """A flag of a command."""

  name: str
  help: str
  default: Any = None
  parser: flags.ArgumentParser = TEXT


CONFIG = Flag('config', 'NAME[:VARIANT] or PATH.py, and --config.FIELD=VALUE.')
STEP = Flag('step', 'Saved step or best; default: newest.', None, StepParser())
MODEL = (
  Flag('workdir', 'Run, export, pretrained:NAME or hf:OWNER/NAME.'),
  STEP,
)
DATA_DIR = Flag('data_dir', "Present folder of the run's data, or of tfds.")
LICENSE = Flag('license', "The weights' licence, by its Hub id.", 'unknown')
PROCESSES = (
  Flag('multihost', 'This process is one of several.', False, SWITCH),
  Flag('coordinator', 'HOST:PORT of process 0, without a scheduler.'),
  Flag('num_processes', 'With --coordinator: their number.', None, INTEGER),
  Flag('process_id', 'With --coordinator: this one, from 0.', None, INTEGER),
  Flag('lost_after', 'Seconds of silence until loss.', 100, INTEGER),
)


def command(*options, paths: bool = False):
  """Makes main(arguments=None, program='') from main(flags, *paths).

  The docstring of its module is the help. `flags` holds the values of
  `options`, and with CONFIG the typed `command` and the `run_name`, such as
  cifar10_f4; with `paths` too, the config may be one of them, or missing. A bad
  flag, an error that rvq_jax raises and an OSError from anywhere end in one
  line and exit code 2; the loss of another process or of a data worker in one
  line and code 75. A traceback means a fault in the program.
  """
  return lambda function: functools.partial(_main, function, options, paths)


def _main(function, options, paths, arguments=None, program=''):
  _open_streams()
  arguments = sys.argv[1:] if arguments is None else arguments
  program = program or f'python {sys.argv[0]}'
  values = flags.FlagValues()  # all commands would share absl's own
  for name, text, default, parser in options:
    values[name] = flags.Flag(
      parser, None, name, default, text, boolean=parser is SWITCH
    )
  if _HELP.isdisjoint(arguments):
    typed = f'{program} {shlex.join(arguments)}'
    _run(function, *_read(values, arguments, paths, typed))
  else:
    module = sys.modules[function.__module__]
    usual = f'rvq {module.__name__.rpartition(".")[2].strip("_")} '
    text = doc(module).replace(usual, f'{program} ')
    show(f'{text}\n{values.get_help(include_special_flags=False)}')


def doc(module) -> str:
  """The docstring of a module, also under `python -OO`, which drops it."""
  source = Path(module.__file__).read_text('utf-8')
  return ast.get_docstring(ast.parse(source), clean=False)


def _read(values, arguments, paths, typed):
  """Returns the values of the flags and the other arguments, or fails."""
  has_config, more = 'config' in values, {}
  try:
    _, *rest = values(['', *map(_expand, arguments)], known_only=has_config)
    if has_config and paths and not values.config:
      values.config = next(filter(config_file.is_config, rest), None)
      rest = [x for x in rest if x != values.config]
    if has_config and (values.config or not paths):
      config, name = config_file.load(values.config)
      more = {'command': typed, 'run_name': name}
      config.unlock()  # takes any field: training/config.py refuses
      del values.config  # the config replaces the text
      options = {'flag_values': values, 'sys_argv': rest, 'lock_config': False}
      options['accept_new_attributes'] = True
      config_flags.DEFINE_config_dict('config', config, **options)
    if has_config:
      _, *rest = values(['', *rest])
  except (flags.Error, ValueError) as error:
    fail(error)
  except (KeyError, IndexError, TypeError) as error:  # from ml_collections
    fail(f'{shlex.join(rest)}: no such field: {error.args[0]}')
  if rest and not paths:
    fail(f'expected only flags (--name=value), got {" ".join(rest)!r}')
  return SimpleNamespace(**values.flag_values_dict() | more), rest


def _expand(argument):
  """Replaces ~, which shells leave in --name=~/value; refuses URLs."""
  start = argument.find('=') + 1 if argument.startswith('-') else 0
  value = os.path.expanduser(argument[start:])
  if re.match(r'(folder:)?(?!folder:)[a-z][a-z0-9+.-]*://', value, re.I):
    reason = 'expected a local path; copy the files here, or mount the bucket'
    raise ValueError(f'{argument}: {reason}')
  if value == '~' or value.startswith('~/'):
    reason = 'this user has no home directory: expected a full path'
    raise ValueError(f'{argument}: {reason}')
  return argument[:start] + value


def show(text) -> None:
  """Prints `shown` text, or ends the program like `_run`."""
  try:
    print(shown(text), flush=True)
  except OSError as error:
    _stop(error)


def _open_streams():
  """Opens closed standard streams, whose numbers files would get."""
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:
      mode = 'r' if name == 'stdin' else 'w'
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - to the end


def _prepare_logs():
  faulthandler.enable()
  logging.basicConfig(level=logging.INFO, force=True)
  form = Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  logging.getLogger().handlers[0].setFormatter(form)
  for name in _NOISY:  # they log each file, and also the errors they raise
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # TensorStore's threads report a failed save after Orbax has closed its loop;
  # the main thread reports the cause.
  sys.unraisablehook = lambda args: (
    'Event loop is closed' in str(args.exc_value)
    or sys.__unraisablehook__(args)
  )


def _run(function, values, paths):
  """Runs a command; each end has its line and its exit code."""
  _prepare_logs()
  try:
    function(values, *paths)
    sys.stdout.flush()
  except (KeyboardInterrupt, Exception) as error:
    if _is_interrupt(error):
      print('interrupted; finished work is kept', file=sys.stderr)
      sys.stdout.flush()
      os._exit(130)  # at once: does not wait for threads that still save
    if _is_expected(error):
      _stop(error)
    if _process() is None:
      raise
    from rvq_jax.training.multihost import peer_is_lost

    if peer_is_lost(error):
      fail(
        'another process of the run died or is unreachable, see its log; the '
        'same command resumes from the last checkpoint '
        f'({str(error).splitlines()[0]})',
        _LOST,
      )
    traceback.print_exc()
    fail(error, 1)


def _is_interrupt(error) -> bool:
  """Whether Ctrl-C is the cause; imports in compiled modules wrap it."""
  while not isinstance(error, KeyboardInterrupt | None):
    error = error.__cause__ or error.__context__
  return error is not None


def _is_expected(error) -> bool:
  """Whether the user or the machine is the cause, not our code.

  These are all OSErrors, and errors that rvq_jax raises or passes on from a
  library that reads a file for it.
  """
  names = [
    frame.f_globals['__name__']
    for frame, _ in traceback.walk_tb(error.__traceback__)
  ]
  name = next(name for name in reversed(names) if not name.startswith(_READERS))
  ours = name.startswith('rvq_jax.') and isinstance(error, _EXPECTED)
  return ours or isinstance(error, OSError)


def _stop(error):
  """Ends the program with the line and code of an expected error."""
  output = select.poll()
  output.register(1, 0)  # reports only errors: the reader has ended
  quiet = isinstance(error, BrokenPipeError) and output.poll(0)
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes the buffered text
  if quiet:
    sys.exit(1)
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    names = filter(None, (error.filename, error.filename2))
    text = ': '.join([*map(str, names), error.strerror])
  fail(text, _LOST if isinstance(error, ChildProcessError) else 2)


def prepare_backend(flags, *, share_gpus: bool = False) -> None:
  """Prepares JAX; joins the other processes. Only the first one logs."""
  # Import after the check of the flags: this takes seconds.
  from rvq_jax.training import backend, multihost

  backend.prepare_backend(share_gpus=share_gpus)
  if 'multihost' in vars(flags):
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if flags.multihost:
      multihost.initialize(*given, lost_after=flags.lost_after)
    elif given != (None, None, None):
      fail('--coordinator and its flags need --multihost: add it')
    if not is_first():
      logging.getLogger().setLevel(logging.WARNING)


def _process() -> int | None:
  """The index of this process, from 0; None for a single process."""
  jax = sys.modules.get('jax')
  several = jax is not None and jax.distributed.is_initialized()
  return jax.process_index() if several else None


def is_first() -> bool:
  """Whether this process prints for the run."""
  return not _process()


def fail(message, code: int = 2) -> None:
  """Ends the program: one line on standard error, and an exit code."""
  print('error: ' + shown(' '.join(str(message).split())), file=sys.stderr)
  if _process() is None:
    sys.exit(code)
  if is_first():
    time.sleep(5)  # the others abort when the first one ends: let them print
  sys.stderr.flush()
  os._exit(code)  # an orderly exit waits for the other processes


def check_usage(flags, paths, usage: str) -> None:
  """Ends the program unless it has two folders, or two paths as in `usage`.

  The second path is a new file with the suffix at the end of `usage`.
  """
  expected_paths = 0 if flags.input and flags.output else 2
  if not flags.workdir or len(paths) != expected_paths:
    fail(f'expected --workdir=DIR, and {usage} or --input=DIR --output=DIR')
  if paths and not paths[1].endswith(Path(usage).suffix):
    fail(f'expected an output FILE{Path(usage).suffix}, got {paths[1]!r}')
  if paths and os.path.lexists(paths[1]):
    fail(f'{paths[1]} exists and is not overwritten; name another output')
