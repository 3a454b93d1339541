"""benchmarks/gpu: what it counts as wrong, and what a kill leaves of it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types

import jax
import numpy as np
import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.stages import common


def nearest(e, codes, order=0):
  """By all differences in float64: the id of the nearest code, or the next."""
  e, codes = e.astype(np.float64), codes.astype(np.float64)
  found = [np.argsort(np.sum((x - codes) ** 2, axis=1))[order] for x in e]
  return np.array(found)


def test_only_codes_that_are_not_the_nearest_count_as_wrong():
  exact = stages.wrong_ids(nearest, 40, 60, 16)
  assert exact.pop('greatest excess') < 1e-9
  assert len(exact) == 5 and not any(exact.values())
  wrong = stages.wrong_ids(lambda *x: nearest(*x, 1), 40, 60, 16, n=50)
  assert wrong.pop('greatest excess') > 1e-4
  assert all(count >= 39 for count in wrong.values())


@pytest.mark.parametrize('k', [2**14, 2**17, 2**18])
def test_products_with_all_codes_are_indexed_by_32_bits(k):
  assert 2**20 < stages.rows_that_fit(131_072, k) * k < 2**31


@pytest.mark.parametrize('backend,device', [('gpu', 'cuda'), ('cpu', None)])
def test_pytorch_computes_where_jax_does(monkeypatch, backend, device):
  chosen, torch = [], types.ModuleType('torch')
  torch.set_num_threads = torch.manual_seed = lambda n: None
  torch.set_default_device = chosen.append
  torch.backends = types.SimpleNamespace(cudnn=types.SimpleNamespace())
  peer = types.ModuleType('vector_quantize_pytorch')
  peer.VectorQuantize = lambda **_: list(chosen)
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'vector_quantize_pytorch', peer)
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  _, made_after = common.make_peer(2, 2)
  assert made_after == ([device] if device else [])


KILLED = """
import os, signal, sys
from benchmarks.gpu.stages import Table
table = Table('edges', *sys.argv[1:])
table.add(what='search', sound=True)
with table.attempt('gradients'):
  raise ValueError('no | such')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_stage_leaves_its_rows(run_python, tmp_path):
  assert run_python(KILLED, tmp_path, tmp_path).returncode == -signal.SIGKILL
  [record] = json.loads((tmp_path / 'results.json').read_text())
  assert [row['what'] for row in record['rows']] == ['search', 'gradients']
  text = (tmp_path / 'summary.md').read_text()
  assert 'edges (STOPPED' in text and 'should be: 1' in text


@pytest.mark.slow
def test_killed_after_a_stage_it_leaves_that_one_and_goes_on(tmp_path):
  command = ['bash', 'benchmarks/gpu/on_device.sh', 'speed']
  places = {'OUT': str(tmp_path / 'out'), 'WORK': str(tmp_path / 'work')}
  places |= {'PYTHON': sys.executable, 'REHEARSE': '1'}
  done = []

  def kill_after(*names):
    """Kills the campaign once these stages are packed; gives their records."""
    started = time.monotonic()
    child = subprocess.Popen(
      command, cwd=common.ROOT, env=os.environ | places, start_new_session=True
    )
    try:
      while time.monotonic() - started < 250 and child.poll() is None:
        time.sleep(0.1)
        if (tmp_path / 'out/more.tgz').exists() and set(names) <= packed():
          break
    finally:
      os.killpg(child.pid, signal.SIGKILL)
      child.wait()
    return [x for x in records() if x['done']]

  def packed():
    with tarfile.open(tmp_path / 'out/more.tgz') as archive:
      return {x.removesuffix('.log')[5:] for x in archive.getnames()}

  def records():
    return json.loads((tmp_path / 'out/results.json').read_text())

  [done] = kill_after('quantizer')
  assert done['stage'] == 'quantizer' and len(done['rows']) == 4
  again = kill_after('quantizer', 'step_imagenet')
  assert {x['stage'] for x in again} == {'quantizer', 'step_imagenet'}
  assert done in again  # not run once more
  assert len(list((tmp_path / 'out').iterdir())) <= 5
