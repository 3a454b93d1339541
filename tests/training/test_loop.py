"""Runs: their files, their end by signal, what they refuse."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent import futures
from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line

from rvq_jax import sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.training import config as config_lib
from rvq_jax.training import loop, validation
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.writers import read_jsonl


def test_a_run_leaves_its_files_and_once_finished_stays(tiny_config, tmp_path):
  tiny_config.num_steps = 5  # no multiple of any interval
  result = loop.train(tiny_config, tmp_path)
  assert np.isfinite(result['mse'])
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.resolve() == 5
    assert checkpoints.meta(5)['position']['step'] == 5
    best = checkpoints.resolve('best')
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  scores = {
    r['step']: r['validation/mse'] for r in records if 'validation/mse' in r
  }
  assert sorted(scores) == [3, 5]
  assert best == min(scores, key=scores.get)
  assert [r['step'] for r in records if 'train/loss' in r] == [2, 4, 5]
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config == config_lib.check_config(tiny_config)
  assert list((tmp_path / 'tensorboard').iterdir())
  loop.train(tiny_config, tmp_path)
  assert read_jsonl(tmp_path / 'metrics.jsonl') == records


@pytest.mark.slow
def test_corrupt_validation_images_do_not_cost_the_run(
  tiny_config, image_folder, tmp_path, caplog
):
  images = shutil.copytree(image_folder, tmp_path / 'images')
  for i in range(2):  # of 63: over 1 %
    (images / f'validation/class0/{2 * i:03d}.png').write_bytes(b'')
  tiny_config.data.name, tiny_config.num_steps = f'folder:{images}', 5
  result = loop.train(tiny_config, tmp_path / 'run')
  assert result['images'] == 10 and 'skipped image validation/' in caplog.text


@pytest.mark.parametrize('limit,times', [(2**28, 1), (0, 2)])
def test_small_validation_splits_stay_decoded(monkeypatch, limit, times):
  source = datasets.open_dataset('photos').validation
  read = mock.Mock(side_effect=loaders.eval_batches)
  monkeypatch.setattr(loaders, 'eval_batches', read)
  monkeypatch.setattr(validation, 'KEPT_LIMIT', limit)
  split = validation.Split(source, batch_size=48, image_size=16)
  next(iter(split))  # one that is not read to its end is not kept
  read.reset_mock()
  first, second = list(split), list(split)
  assert read.call_count == times and len(first) > 1
  jax.tree.map(np.testing.assert_array_equal, first, second)
  images = split.first_images
  np.testing.assert_array_equal(images, first[0]['image'][: len(images)])


def test_a_second_interrupt_stops_at_once(default_signals):
  with loop.StopSignal() as stop, pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed(ask=False)
    assert stop.exit_code == 130
    signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
  def use():
    with loop.StopSignal() as stop:
      return stop.exit_code

  with futures.ThreadPoolExecutor() as pool:
    assert pool.submit(use).result() is None


HOLD = """
import sys
from rvq_jax.training.loop import lock
with lock(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_refused_before_it_opens_the_data(
  tmp_path, tiny_config, monkeypatch
):
  command, pipe = [sys.executable, '-c', HOLD, str(tmp_path)], subprocess.PIPE
  process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
  try:
    assert process.stdout.readline() == 'held\n'
    monkeypatch.setattr(datasets, 'open_dataset', pytest.fail)
    with one_line(f'{tmp_path} is in use by another'):
      loop.train(tiny_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']
  finally:
    process.kill()
    process.communicate()
  for _ in range(2):  # once the first is gone
    with loop.lock(tmp_path):
      pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path, tiny_config):
  (tmp_path / 'file').write_text('')
  with one_line('--workdir: cannot write to .*/file/run'):
    loop.train(tiny_config, tmp_path / 'file' / 'run')


def test_a_workdir_in_which_nothing_was_written_is_removed(tmp_path):
  old = tmp_path / 'old'
  old.mkdir()
  for workdir in (old, old / 'a' / 'empty', old / 'b' / 'used'):
    with loop.lock(workdir):
      assert (workdir / '.lock').exists()
      if workdir.name == 'used':
        (workdir / 'config.json').write_text('')
  assert {path.name for path in old.rglob('*')} == {
    *('.lock', 'b', 'used', 'config.json')
  }


class Batches(list):
  position = None

  def __next__(self):
    return {'image': np.full(8, self.pop(0))}


def test_at_most_two_steps_are_in_flight(monkeypatch):
  losses = [mock.Mock(**{'is_ready.return_value': False}) for _ in range(6)]
  left = iter(losses)

  def take(step, state, batch, lpips_weights):
    return int(batch['image'][0]), {'loss': next(left)}

  monkeypatch.setattr(loop, 'compile_step', lambda mesh: take)
  stepper = loop.Stepper(Batches(range(6)), sharding.data_mesh())
  assert [stepper(None, None)[0] for _ in range(4)] == [0, 1, 2, 3]
  waited_for = [x.block_until_ready.called for x in losses[:4]]
  assert waited_for == [True, True, False, False]
  assert stepper.waited > 0
  stepper.waited = 0.0
  stepper(None, None)
  assert stepper.waited == 0  # the devices had work
  losses[4].is_ready.return_value = True
  stepper(None, None)
  assert stepper.waited > 0
