"""evaluate.py --check: what it says of a sound run, and of broken ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rvq_jax.evaluation import check
from rvq_jax.evaluation.load import load
from rvq_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
  'manifest',
  'finite',
  'codes = embedding_sum / smoothed cluster_size',
  'ids in range',
  'decode(encode(x)) == reconstruct(x)',
]


@pytest.fixture
def run(tiny_run):
  return tiny_run


@pytest.fixture
def with_book(run, monkeypatch):
  """Returns a function that checks the run with a changed codebook."""

  def changed(change):
    tokenizer = load(run)
    book = tokenizer.variables['codebook']['vq']
    name, value = change({k: np.array(x) for k, x in book.items()})
    book[name] = jnp.asarray(value)
    monkeypatch.setattr(check, 'load', lambda *_: tokenizer)
    return {f.name: f for f in check.check_run(run)}

  return changed


def test_a_sound_run_passes(run):
  findings = check.check_run(run)
  assert [f.name for f in findings] == NAMES
  assert all(f.ok for f in findings), findings
  assert not any('\n' in str(f) for f in findings)


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    {'quantizer': 'residual', 'depth': 2},
    {'quantizer': 'product', 'heads': 2},
    {'quantizer': 'fsq'},
    {'ema': False},
    {'cosine': True},
  ],
  ids=str,
)
def test_every_kind_of_codebook_passes(change, tiny_config, tmp_path):
  tiny_config.num_steps = 3
  tiny_config.model.update(change)
  loop.train(tiny_config, tmp_path)
  assert all(f.ok for f in check.check_run(tmp_path))


def test_a_code_that_left_its_average_is_named(with_book):
  def move(book):
    book['embedding'][5] *= 1.01
    return 'embedding', book['embedding']

  found = with_book(move)[NAMES[2]]
  assert not found.ok and 'code 5' in found.detail


def test_a_number_that_is_not_finite_is_named(with_book):
  def spoil(book):
    book['cluster_size'][3] = np.inf
    return 'cluster_size', book['cluster_size']

  found = with_book(spoil)
  assert not found['finite'].ok
  assert 'codebook/vq/cluster_size' in found['finite'].detail


def test_ids_out_of_range_and_other_bits_are_found(run, monkeypatch):
  tokenizer = load(run)
  encode, decode = tokenizer.encode, tokenizer.decode
  monkeypatch.setattr(check, 'load', lambda *_: tokenizer)
  calls = []

  def wavering(ids):
    calls.append(ids)
    images = decode(ids)
    return images if len(calls) == 1 else images.at[0, 0, 0, 0].add(1e-6)

  monkeypatch.setattr(tokenizer, 'decode', wavering)
  *_, same = check.check_run(run)
  assert not same.ok and same.detail.startswith('1 of ')
  monkeypatch.setattr(tokenizer, 'encode', lambda x: encode(x) + 16)
  *_, inside, same = check.check_run(run)
  assert not inside.ok and not same.ok


def test_the_launcher_prints_a_line_each_and_exits_1_on_damage(run, tmp_path):
  run = shutil.copytree(run, tmp_path / 'run')
  flags = [f'--workdir={run}', '--check']
  command = [sys.executable, 'launch/evaluate.py', *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert [line[:8] for line in done.stdout.splitlines()] == ['ok      '] * 5
  meta = run / 'checkpoints/6/meta/metadata'
  text = json.loads(meta.read_text())
  text['position'] = {'step': 2}
  meta.write_text(json.dumps(text))
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  [line] = done.stdout.splitlines()
  assert line.startswith('FAILED  manifest: meta/metadata')


@pytest.mark.parametrize(
  ('step', 'old', 'new'),
  [
    *(
      (step, b'{', new)
      for step in (None, 6, 'best')
      for new in (b'\0', b'\xff')
    ),
    ('best', b'"mse"', b'"msf"'),
  ],
)
def test_damaged_scores_of_any_step_are_one_finding(
  run, tmp_path, step, old, new
):
  run = shutil.copytree(run, tmp_path / 'run')
  path = run / 'checkpoints/3/metrics/metrics'
  path.write_bytes(path.read_bytes().replace(old, new))
  [found] = check.check_run(run, step)
  assert not found.ok and found.name == 'manifest'
  assert 'step 3' in found.detail and 'metrics/metrics' in found.detail
  assert '\n' not in str(found)
