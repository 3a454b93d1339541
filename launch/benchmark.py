"""`rvq benchmark` in a checkout."""

from checkout import COMMANDS

if __name__ == '__main__':
  COMMANDS['benchmark'].main()
