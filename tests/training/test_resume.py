"""A run that is cut off and resumed ends in the bits of one that is not."""

import os
import signal

import jax
import numpy as np
import pytest

from rvq_jax.training import loop
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
