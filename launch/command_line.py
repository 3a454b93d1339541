"""What the launchers share: parsing, logging and errors in one line."""

import functools
import logging
import os
import shlex
import sys
import threading
import time
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
# So that configs can build on each other, and the package need not be
# installed; this folder itself is on the path already.
sys.path.insert(1, str(ROOT))

_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)


_LAST_WORDS = 5  # seconds
_LOST = 75  # EX_TEMPFAIL: started again, the run goes on


def fail(message: str, code: int = 2) -> None:
  """Ends the program: one line on standard error, and an exit code."""
  print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  _end(code)


def _process() -> tuple[int, int]:
  """This process and how many there are, after `join`; else (0, 1)."""
  jax = sys.modules.get('jax')
  if jax is None or not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


def _end(code):
  if _process()[1] == 1:
    sys.exit(code)
  if is_first():
    # The others abort when the first one ends: they may have their own word to
    # say, about the same mistake.
    time.sleep(_LAST_WORDS)
  # The orderly way waits for the other processes, which may wait for this one.
  logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def join(*arguments, **options) -> None:
  """Makes this process one of several; see `multihost.initialize`."""
  from rvq_jax.training import multihost

  multihost.initialize(*arguments, **options)
  if not is_first():
    logging.getLogger().setLevel(logging.WARNING)


def is_first() -> bool:
  """Whether this process speaks for the run."""
  return _process()[0] == 0


def config_name(flag) -> str:
  """NAME or NAME_VARIANT of --config=configs/NAME.py[:VARIANT].

  Ends the program in one line where there is no such file.

  Args:
    flag: the config flag itself, `flags.FLAGS['config']`.
  """
  given = config_flags.get_config_filename(flag) if flag.present else ''
  path, _, variant = given.partition(':')
  if not Path(path).is_file():
    got = f', got {path}' if path else ''
    fail(
      'expected --config=configs/NAME.py; there are '
      + ', '.join(sorted(map(str, Path('configs').glob('*.py'))))
      + got
    )
  return Path(path).stem + (f'_{variant}' if variant else '')


def command() -> str:
  """The command line of this program, as one would type it."""
  return shlex.join(['python', *sys.argv])


def _parse(argv, positional=0):
  try:
    rest = flags.FLAGS(argv)
  except Exception as error:  # config_flags lets any exception through
    message = str(error).strip('\'"') or repr(error)
    # It also quotes the traceback of a config file; the last line is its point.
    fail(message.splitlines()[-1] if 'Traceback' in message else message)
  if len(rest) > 1 + positional:
    more = f'at most {positional} paths and ' if positional else 'only '
    got = ' '.join(rest[1:])
    fail(f'expected {more}flags (--name=value), got {got!r}')
  return rest


def _is_ours(error) -> bool:
  """Whether our own code raised it, with a message made for people."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return ROOT / 'rvq_jax' in Path(frame.filename).resolve().parents


def _set_up_logging():
  """Our lines alone: absl's are Orbax's and tfds's accounts of each file."""
  root = logging.getLogger()
  root.handlers.clear()
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  root.addHandler(handler)
  root.setLevel(logging.INFO)
  for name in ('jax', 'orbax', 'tensorboardX'):
    logging.getLogger(name).setLevel(logging.ERROR)
  # Orbax writes a traceback of each error that it then raises, and asyncio of
  # those that came beside it.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def _hear_threads() -> None:
  """Lets threads that fail say so in a line; `main` fails with the cause."""

  def of_thread(args):
    if isinstance(args.exc_value, OSError):
      logging.warning('%s', args.exc_value)
    else:
      threading.__excepthook__(args)

  def unraisable(args):
    # What TensorStore's threads tell a save that has failed and is gone.
    if str(args.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(args)

  threading.excepthook = of_thread
  sys.unraisablehook = unraisable


def check_output(path: str, suffix: str) -> None:
  """Ends the program unless an output is a new file that ends in `suffix`."""
  if not path.endswith(suffix):
    fail(f'expected an output FILE{suffix}, got {path!r}')
  if os.path.lexists(path):
    fail(f'{path} exists and is not overwritten; name another output')


def prepare_backend() -> None:
  """What a launcher calls before its first program is compiled."""
  from rvq_jax.training import runtime

  runtime.prepare()


def parse_step(step: str | None) -> int | str | None:
  """The value of a flag --step: a number, 'best' or None."""
  if step is not None and step != 'best' and not step.isdecimal():
    fail(f'--step: expected a number or best, got {step!r}')
  return int(step) if step and step != 'best' else step


def run(main, *, positional: int = 0) -> None:
  """Runs main() as a program.

  Bad flags and errors that rvq_jax raises on purpose end in one line and exit
  code 2, the loss of another process of the run or of a data worker in one line
  and exit code 75; a traceback means a fault in the program.

  Args:
    main: function of the arguments that are no flags.
    positional: how many of these there may be.
  """

  def guarded(argv):
    _set_up_logging()
    _hear_threads()
    try:
      main(*argv[1:])
    except Exception as error:
      if isinstance(error, _EXPECTED) and _is_ours(error):
        # A process of this run that died, as one of several hosts may.
        fail(error, _LOST if isinstance(error, ChildProcessError) else 2)
      index, count = _process()
      if count == 1:
        raise
      from rvq_jax.training import multihost

      if multihost.peer_is_lost(error):
        fail(
          f'process {index} of {count}: another process of the run is gone or '
          f'out of reach, see its log; the same command goes on from the last '
          f'checkpoint ({str(error).splitlines()[0]})',
          _LOST,
        )
      traceback.print_exc()
      _end(1)
    except KeyboardInterrupt:
      print('interrupted; what was finished is kept', file=sys.stderr)
      sys.stdout.flush()
      os._exit(130)  # at once: without waiting for threads that still save

  app.run(
    guarded, flags_parser=functools.partial(_parse, positional=positional)
  )
