"""What the launchers share: parsing, logging and errors in one line."""

import logging
import shlex
import sys
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
# So that configs can build on each other, and the package need not be
# installed; this folder itself is on the path already.
sys.path.insert(1, str(ROOT))

_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)


def fail(message: str) -> None:
  """Ends the program: one line on standard error, exit code 2."""
  print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  sys.exit(2)


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


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)
  except Exception as error:  # config_flags lets any exception through
    message = str(error).strip('\'"') or repr(error)
    # It also quotes the traceback of a config file; the last line is its point.
    fail(message.splitlines()[-1] if 'Traceback' in message else message)
  if len(rest) > 1:
    fail(f'expected only flags (--name=value), got {" ".join(rest[1:])!r}')
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
  for name in ('absl', 'jax', 'orbax', 'tensorboardX'):
    logging.getLogger(name).setLevel(logging.ERROR)


def run(main) -> None:
  """Runs main() as a program.

  Bad flags and errors that rvq_jax raises on purpose end in one line and exit
  code 2; a traceback means a fault in the program.

  Args:
    main: function without arguments.
  """

  def guarded(argv):
    del argv
    _set_up_logging()
    try:
      main()
    except _EXPECTED as error:
      if not _is_ours(error):
        raise
      fail(error)

  app.run(guarded, flags_parser=_parse)
