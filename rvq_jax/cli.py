"""The command `rvq`: `rvq train` is rvq_jax/commands/train.py, and so on."""

import sys
from importlib.metadata import version

from rvq_jax.commands import (
  benchmark,
  decode,
  encode,
  evaluate,
  explore,
  export,
  import_,
  reproduce,
  train,
)
from rvq_jax.commands.config_file import MODULES
from rvq_jax.commands.program import doc, fail, show

COMMANDS = {
  module.__name__.rpartition('.')[2].strip('_'): module
  for module in (
    *(train, evaluate, encode, decode, import_, export, explore, reproduce),
    benchmark,
  )
}


def main() -> None:
  """Runs `rvq COMMAND ...`."""
  command, *arguments = sys.argv[1:] or ['--help']
  if command in COMMANDS:
    COMMANDS[command].main(arguments, f'rvq {command}')
  elif command in ('-h', '--help', 'help'):
    lines = ['rvq COMMAND [flags]; rvq COMMAND --help lists the flags:\n']
    for name, module in COMMANDS.items():
      lines.append(f'  {name:<10} {doc(module).splitlines()[0]}')
    lines.append(f'\nConfigs for train and reproduce: {", ".join(MODULES)}.')
    show('\n'.join(lines))
  elif command == '--version':
    show(f'rvq_jax {version("rvq_jax")}')
  else:
    fail(f'expected rvq {", ".join(COMMANDS)} or --help, got {command!r}')


if __name__ == '__main__':  # python -m rvq_jax.cli, where rvq is not on PATH
  main()
