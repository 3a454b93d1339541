"""The flag --config: a config by its name or its file."""

import importlib
import importlib.util
import inspect
import pkgutil
from os.path import isfile
from pathlib import Path

from ml_collections import ConfigDict

FOLDER = (Path(__file__).resolve().parents[1] / 'configs').resolve()
MODULES = {
  module.name.rpartition('.')[2]: module.name
  for module in pkgutil.iter_modules([str(FOLDER)], 'rvq_jax.configs.')
}
"""Name -> module, for each config in the package."""


def is_config(given: str) -> bool:
  """Whether NAME[:VARIANT] or PATH.py[:VARIANT] exists."""
  path = given.partition(':')[0]
  return path in MODULES or (path.endswith('.py') and isfile(path))


def load(given: str | None) -> tuple[ConfigDict, str]:
  """Opens NAME[:VARIANT] or PATH.py[:VARIANT].

  Returns:
    The config, and NAME or NAME_VARIANT for the folder of a run.

  Raises:
    ValueError: there is no such config or variant, or its file fails.
  """
  path, *variant = (given or '').split(':', 1)
  if not is_config(path):
    raise ValueError(
      'expected --config=NAME, or the path of a config file; NAME is one of '
      f'{", ".join(MODULES)}; got {repr(given) if given else "none"}'
    )
  try:
    stem, folder = Path(path).stem, Path(path).resolve().parent
    if path in MODULES or (folder == FOLDER and stem in MODULES):
      module = importlib.import_module(MODULES[stem])
    else:
      spec = importlib.util.spec_from_file_location('config_file', path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
    get_config = getattr(module, 'get_config', None)
    if get_config is None:
      raise ValueError(f'{path}: expected a function get_config')
    try:
      inspect.signature(get_config).bind(*variant)
    except TypeError:
      expected = 'NAME without a colon' if variant else 'NAME:VARIANT'
      raise ValueError(f'{path}: expected --config={expected}') from None
    config = ConfigDict(get_config(*variant))
  except ValueError:
    raise
  except Exception as error:  # the file may raise any type
    reason = error.args[0] if isinstance(error, KeyError) else error
    raise ValueError(f'{path}: {type(error).__name__}: {reason}') from error
  return config, '_'.join([stem, *filter(None, variant)]).replace(',', '_')
