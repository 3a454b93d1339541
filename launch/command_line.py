"""What the launchers share: flags, logging, the backend, one-line errors."""

import logging
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # configs import each other and the package
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_PATHS = ('workdir', 'init', 'input', 'output', 'data_dir', 'save_images')
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


def config_name(flag) -> str:
  """NAME or NAME_VARIANT of the flag --config=configs/NAME.py[:VARIANT]."""
  given = config_flags.get_config_filename(flag) if flag.present else ''
  path, _, variant = given.partition(':')
  if not Path(path).is_file():
    configs = sorted(map(os.path.relpath, (ROOT / 'configs').glob('*.py')))
    names = ', '.join(configs)
    what = path or 'none'
    fail(f'expected --config=configs/NAME.py; there are {names}; got {what}')
  return Path(path).stem + (f'_{variant}' if variant else '').replace(',', '_')


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
  if isinstance(error, KeyError | AttributeError):
    return 'the config has no field ' + text.strip('\'"')
  if 'Traceback' in text:  # of a config file; the last line says why
    text = re.sub(r'^\w+Error: ', '', text.strip().splitlines()[-1])
  # Several arguments of an exception read as a tuple.
  return re.sub(r"\('(.*)', '(.*)'\)$", r"\1: '\2'", text)


def _parse(argv, positional):
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
    for name in ('jax', 'orbax', 'tensorboardX', 'absl', 'asyncio'):
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
    except Exception as error:
      frame = traceback.extract_tb(error.__traceback__)[-1]
      ours = ROOT / 'rvq_jax' in Path(frame.filename).resolve().parents
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

  app.run(guarded, flags_parser=lambda argv: _parse(argv, positional))
