"""The flag --config: a config by its name or its file, and its fields."""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from os.path import isfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

FOLDER = (Path(__file__).resolve().parents[1] / 'configs').resolve()
MODULES = {
  module.name.rpartition('.')[2]: module.name
  for module in pkgutil.iter_modules([str(FOLDER)], 'rvq_jax.configs.')
}
"""Name -> module, for each config that comes with the package."""


def load(given: str | None) -> tuple[ConfigDict, str]:
  """Opens NAME[:VARIANT] or PATH.py[:VARIANT].

  Returns:
    The config, and NAME or NAME_VARIANT for the folder of a run.

  Raises:
    ValueError: there is no such config or variant, or its file has a fault.
  """
  path, *variant = (given or '').split(':', 1)
  if path not in MODULES and not (path.endswith('.py') and isfile(path)):
    raise ValueError(
      'expected --config=NAME, or the path of a config file; NAME is one of '
      f'{", ".join(MODULES)}; got {repr(given) if given else "none"}'
    )
  try:
    config = _call(_module(path), variant)
  except ValueError:
    raise
  except Exception as error:  # whatever the file does
    raise ValueError(f'{path}: {type(error).__name__}: {error}') from error
  config = config if isinstance(config, ConfigDict) else ConfigDict(config)
  name = '_'.join([Path(path).stem, *filter(None, variant)])
  return config, name.replace(',', '_')


def _module(path):
  """The module; a shipped file has one name, however it is given."""
  name, folder = Path(path).stem, Path(path).resolve().parent
  if path in MODULES or (name in MODULES and folder == FOLDER):
    return importlib.import_module(MODULES[name])
  spec = importlib.util.spec_from_file_location('config_file', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _call(module, variant):
  if not hasattr(module, 'get_config'):
    raise ValueError('the config file does not define get_config()')
  try:
    inspect.signature(module.get_config).bind(*variant)
  except TypeError:
    raise ValueError(
      'this config has no variants: expected --config=NAME without a colon'
      if variant
      else 'this config needs a variant: expected --config=NAME:VARIANT'
    ) from None
  return module.get_config(*variant)


def check_fields(config: ConfigDict, arguments: list[str]) -> None:
  """Raises UnrecognizedFlagError where --config.FIELD names no field."""
  fields = list(_fields(config, 'config'))
  for argument in arguments:
    name = argument.lstrip('-').partition('=')[0].removeprefix('no')
    if name.startswith('config.') and name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      raise flags.UnrecognizedFlagError(name, suggestions=near)


def _fields(config, prefix):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f'{prefix}.{name}')
    else:
      yield f'{prefix}.{name}'
