"""The code blocks of a Markdown page, and how to run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
  f'--config.{field}'
  for field in (
    *('num_steps=4', 'batch_size=8', 'log_every=2', 'optimizer.warmup_steps=0'),
    *('model.quantize_after=0', 'model.widths=(4,8)', 'model.num_heads=2'),
    *('model.num_res_blocks=0', 'model.code_dim=4'),
  )
]
"""Flags with which training takes seconds."""
AS_A_USER = {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
"""What conftest.py sets for quick compilation costs more than it saves here."""


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
  """(language, code) of each fenced block in one of the languages, in order."""
  fenced = re.findall(r'^```(\w+)\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
  return [block for block in fenced if block[0] in languages]


def commands(code: str) -> list[str]:
  """The commands of a bash block, continued lines joined."""
  return code.replace('\\\n', ' ').strip().splitlines()


def run_command(command: str, cwd, *more: str) -> str:
  """Runs a line `rvq ...` or `python ...`; returns what it wrote."""
  program, *arguments = shlex.split(command, comments=True)
  start = {'python': [], 'rvq': ['-m', 'rvq_jax.cli']}[program]
  done = subprocess.run(
    [sys.executable, *start, *arguments, *more],
    cwd=cwd,
    env=os.environ | AS_A_USER,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, f'{command}\n{done.stderr}'
  return done.stdout + done.stderr
