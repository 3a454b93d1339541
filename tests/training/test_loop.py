"""Runs: their files, their resumption to the bit, their end by signal."""

import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from rvq_jax.training import loop, settings
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.writers import read_jsonl


def final_bits(config, workdir):
  """Path -> bytes of the newest state of a run."""
  with Checkpoints(workdir, read_only=True) as checkpoints:
    state = loop.Trainer(config, workdir).start(checkpoints)
  return {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


@pytest.mark.parametrize('route', ['memory', 'stream'])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(
  route, tiny_config, tmp_path
):
  if route == 'stream':
    tiny_config.data.crop = 'random_resized'
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  loop.train(tiny_config, whole)
  # Cut off at step 4 by a signal; the cosine is that of the whole run.
  real = loop.Trainer._build_steps

  def interrupt(trainer):
    real(trainer)
    step = trainer.train_step

    def train_step(state, batch):
      if int(state.step) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(state, batch)

    trainer.train_step = train_step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Trainer, '_build_steps', interrupt)
    with pytest.raises(SystemExit) as caught:
      loop.train(tiny_config, parts)
  assert caught.value.code == 143
  with Checkpoints(parts, read_only=True) as checkpoints:
    assert checkpoints.latest_step == 4
  loop.train(tiny_config, parts)
  got, want = (final_bits(tiny_config, d) for d in (parts, whole))
  assert got.keys() == want.keys()
  assert [k for k in want if got[k] != want[k]] == []
  # The log holds each step once, with the same values.
  logs = [
    {
      (r['step'], k): v
      for r in read_jsonl(folder / 'metrics.jsonl')
      for k, v in r.items()
      if 'images_per_second' not in k
    }
    for folder in (whole, parts)
  ]
  assert logs[0] == logs[1]


def test_a_run_leaves_its_files_and_its_last_step(tiny_config, tmp_path):
  tiny_config.num_steps = 5  # no multiple of any interval
  result = loop.train(tiny_config, tmp_path)
  assert np.isfinite(result['mse'])
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step == 5
    assert checkpoints.meta(5)['position'] == {'step': 5}
    best = checkpoints.resolve('best')
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  scores = {
    r['step']: r['validation/mse'] for r in records if 'validation/mse' in r
  }
  assert sorted(scores) == [3, 5]
  assert best == min(scores, key=scores.get)
  assert [r['step'] for r in records if 'train/loss' in r] == [2, 4, 5]
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config == settings.check_config(tiny_config)
  assert list((tmp_path / 'tensorboard').iterdir())


def test_a_finished_run_is_left_as_it_is(tiny_config, tmp_path):
  tiny_config.num_steps = 2
  loop.train(tiny_config, tmp_path)
  before = (tmp_path / 'metrics.jsonl').read_text()
  loop.train(tiny_config, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == before


def test_a_changed_config_is_refused_with_the_difference(tiny_config, tmp_path):
  tiny_config.num_steps = 2
  loop.train(tiny_config, tmp_path)
  tiny_config.optimizer.learning_rate = 1e-3
  with pytest.raises(ValueError, match=r'learning_rate: checkpoint 0.0002'):
    loop.train(tiny_config, tmp_path)


def test_a_longer_run_goes_on(tiny_config, tmp_path):
  tiny_config.num_steps = 2
  loop.train(tiny_config, tmp_path)
  tiny_config.num_steps = 4
  loop.train(tiny_config, tmp_path)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step == 4


def test_divergence_stops_the_run_and_names_the_cause(tiny_config, tmp_path):
  tiny_config.optimizer.learning_rate = 1e30
  tiny_config.optimizer.schedule = 'constant'
  tiny_config.num_steps = 40
  tiny_config.log_every = 5
  with pytest.raises(FloatingPointError, match='steps in a row.*learning_rate'):
    loop.train(tiny_config, tmp_path)


def test_a_second_interrupt_stops_at_once():
  with loop.StopSignal() as stop, pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 130
    signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
  codes = []

  def use():
    with loop.StopSignal() as stop:
      codes.append(stop.exit_code)

  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert codes == [None]
