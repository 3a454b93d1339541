"""`rvq_jax.cli` for the launchers, in a checkout that is not installed too."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'rvq_jax').is_dir():  # a checkout, not a part of the package
  sys.path.insert(1, str(ROOT))

from rvq_jax.cli import (  # noqa: E402, F401
  check_output,
  config_name,
  fail,
  is_first,
  parse_step,
  prepare_backend,
  run,
)
