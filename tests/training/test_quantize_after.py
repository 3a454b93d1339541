"""Steps without quantization, and the first one with it."""

import jax
import numpy as np
import pytest
from errors import one_line
from tiny_step import Run, bits

from rvq_jax import load
from rvq_jax.training import loop
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.writers import read_jsonl

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def config(tiny_config):
  tiny_config.model.quantize_after = 3
  tiny_config.keep_checkpoints = 4
  return tiny_config


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)])
def run(request, config):
  """A run with an EMA codebook or with learned codes."""
  config.model.ema = request.param
  config.model.dead_code_threshold = 0.0
  config.data.flip = False
  return Run(config)


def images(run, seed, spoilt=False):
  shape = (run.config['batch_size'], 16, 16, 3)
  x = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
  return {'image': np.full_like(x, np.nan) if spoilt else x}


def test_the_first_batch_that_is_quantized_and_taken_fills_the_codebook(run):
  state = run.init(run.key)
  for step in (1, 2, 3):
    before = jax.device_get((state.codebook, state.params.get('vq', {})))
    state, metrics = run.train_step(step, state, images(run, step))
    assert bits((state.codebook, state.params.get('vq', {}))) == bits(before)
    assert metrics['loss'] == metrics['mse']
    assert metrics['counts'] is None and 'usage' not in metrics
  assert [run.phase(i).quantize for i in (3, 4)] == [False, True]
  state, metrics = run.train_step(4, state, images(run, 4, spoilt=True))
  assert metrics['skipped'] == 1 and metrics['counts'] is not None
  assert np.sum(state.codebook['vq']['cluster_size']) == 0
  x, options = images(run, 5)['image'], {'mutable': ['batch_stats']}
  z, _ = run.step.model.apply(
    state.variables, x, train=True, method='latents', **options
  )
  state, metrics = run.train_step(5, state, images(run, 5))
  assert metrics['loss'] > metrics['mse']
  book = state.codebook['vq']
  assert np.all(np.asarray(book['cluster_size']) > 0)
  learned = state.params.get('vq', {'embedding': 0.0})['embedding']
  offset = book['embedding' if 'embedding' in book else 'offset']
  codes = np.asarray(learned + offset)
  rows = np.asarray(z).reshape(-1, z.shape[-1])
  distance = np.linalg.norm(codes[:, None] - rows[None], axis=-1).min(1)
  assert distance.max() < 0.1 * np.linalg.norm(rows, axis=1).mean()


@pytest.mark.slow
def test_a_run_reports_the_autoencoder_then_the_codes(config, tmp_path):
  loop.train(config, tmp_path)
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  names = {(r['step'], name) for r in records for name in r}
  validated = {name for step, name in names if step == 3 and 'valid' in name}
  assert validated == {'validation/autoencoder_mse'}
  assert {(6, 'validation/mse'), (6, 'validation/usage')} < names
  assert [i for i in (2, 4, 6) if (i, 'train/usage') in names] == [6]
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.resolve('best') == 6
  assert load(tmp_path).step == 6
  with one_line('step 3 of .* has no codebook'):
    load(tmp_path, 3)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'init_from': 'normal'}, 'codes from data'),
    ({'quantizer': 'fsq'}, 'got fsq'),
    ({'quantize_after': -1}, 'at least 0'),
    ({'quantize_after': 6}, 'less than the 6 steps.* at 0 all '),
  ],
)
def test_what_cannot_be_quantized_late_is_refused(fields, message, config):
  config.model.update(fields)
  with one_line(message):
    Run(config)
