"""export as a person runs it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rvq_jax import load

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  done = subprocess.run(
    [sys.executable, 'launch/export.py', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'},
    capture_output=True,
    text=True,
    timeout=280,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'expected --workdir=DIR and --output=FOLDER'),
    (['--workdir=/no', '--output={tmp}/x'], 'a run with checkpoints'),
    (['--workdir=/no', '--output={tmp}'], 'a new or empty folder'),
  ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(
  arguments, message, tmp_path
):
  (tmp_path / 'mine.txt').write_text('mine')
  code, _, err = run(*(a.format(tmp=tmp_path) for a in arguments))
  assert code == 2, err
  assert message in err and len(err.splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


@pytest.mark.slow
def test_an_export_is_the_model_of_the_run(tiny_run, tmp_path):
  folder = tmp_path / 'export'
  code, out, err = run(
    f'--workdir={tiny_run}', f'--output={folder}', '--stablehlo'
  )
  assert code == 0, err
  names = 'README.md config.json decode_cpu.stablehlo decode_cuda.stablehlo '
  names += 'encode_cpu.stablehlo encode_cuda.stablehlo model.safetensors '
  assert ', '.join((names + 'tokenizer_torch.py').split()) in out
  assert load(folder).model_hash == load(tiny_run).model_hash
