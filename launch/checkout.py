"""The commands of a checkout that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from rvq_jax.cli import COMMANDS  # noqa: E402, F401
