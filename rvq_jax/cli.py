"""The command `rvq`: `rvq train` is rvq_jax/commands/train.py, and so on."""

import sys
from importlib.metadata import version

from rvq_jax.commands import (
  decode,
  encode,
  evaluate,
  explore,
  export,
  reproduce,
  train,
)
from rvq_jax.commands.config_file import MODULES
from rvq_jax.commands.program import fail

COMMANDS = {
  module.__name__.rpartition('.')[2]: module
  for module in (train, evaluate, encode, decode, export, explore, reproduce)
}


def main() -> None:
  """Runs `rvq COMMAND ...`."""
  command, *arguments = sys.argv[1:] or ['--help']
  if command in COMMANDS:
    COMMANDS[command].main(arguments, f'rvq {command}')
  elif command in ('-h', '--help', 'help'):
    print('rvq COMMAND [flags]; rvq COMMAND --help says which flags:\n')
    for name, module in COMMANDS.items():
      print(f'  {name:<10} {module.__doc__.splitlines()[0]}')
    print(f'\nConfigs of train and reproduce: {", ".join(MODULES)}.')
  elif command == '--version':
    print(f'rvq_jax {version("rvq_jax")}')
  else:
    fail(f'expected rvq {", ".join(COMMANDS)} or --help, got {command!r}')
