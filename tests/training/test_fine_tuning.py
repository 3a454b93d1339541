"""A run that starts from a trained model, and what it leaves as it was."""

import functools
import types

import jax
import numpy as np
import pytest
from errors import one_line
from tiny_step import Run
from tiny_step import named_bits as leaves

from rvq_jax import load
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer import tiling
from rvq_jax.training.loop import train

pytestmark = pytest.mark.usefixtures('one_device')
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
SMALL = {
  'model.widths': (4, 4),  # the decoder, too, has BatchNorm
  'optimizer.learning_rate': 0.01,
  'optimizer.weight_decay': 0.5,
  'optimizer.params_ema': 0.9,
}


@pytest.fixture(scope='module')
def model(make_step_config):
  """A tokenizer's parts, with numbers that no initialiser gives."""
  run, rng = Run(make_step_config(SMALL)), np.random.default_rng(1)
  draw = lambda x: rng.uniform(0.5, 1, x.shape).astype('f')  # noqa: E731
  variables = jax.tree.map(draw, run.template.variables)
  variables['codebook']['vq']['embedding'] = rng.normal(size=(8, 8)).astype('f')
  return types.SimpleNamespace(
    variables=variables,
    config=run.config,
    step=1,
    model_hash='0' * 64,
    sides=None,
  )


@pytest.mark.parametrize(
  ('freeze', 'ema', 'kept'),
  [
    ('codes', False, ("['vq']",)),
    ('encoder,codes', True, ("['vq']", "['encoder']")),
  ],
)
def test_what_is_frozen_keeps_its_bits_and_the_rest_learns(
  freeze, ema, kept, model, make_step_config
):
  run = Run(make_step_config(SMALL | {'freeze': freeze, 'model.ema': ema}))
  state = run.init(run.key, model.variables if ema else None)
  increased = lambda tree: jax.tree.map(lambda x: x + 1, tree)  # noqa: E731
  state = state.replace(opt_state=increased(state.opt_state))
  if not ema:  # filled, so that nothing is left to fill
    state = state.replace(codebook=increased(state.codebook))
  names = ('params', 'batch_stats', 'codebook', 'averages')
  old = {name: leaves(getattr(state, name)) for name in names}
  for i in range(3):
    state, metrics = run.train_step(i + 1, state, {'image': IMAGES})
    assert metrics['skipped'] == 0
  for name in names:
    new = leaves(getattr(state, name))
    same = {path for path in new if new[path] == old[name][path]}
    assert same == {path for path in new if any(k in path for k in kept)}, name


@pytest.mark.parametrize(
  'quantizer', ['vq', pytest.param('gumbel', marks=pytest.mark.slow)]
)
def test_what_is_frozen_on_resume_stays_in_every_copy(
  quantizer, make_step_config
):
  fields = SMALL | {'model.quantizer': quantizer}
  run = Run(make_step_config(fields | {'freeze': 'encoder,codes'}))
  state = Run(make_step_config(fields)).init(run.key)
  state = state.replace(  # parameters and averages differ, as after some steps
    averages=jax.tree.map(lambda x: 0.9 * x, state.averages),
    codebook=jax.tree.map(lambda x: x + 1, state.codebook),
  )
  old = leaves(state.eval_variables)
  for i in range(3):
    state, metrics = run.train_step(i + 1, state, {'image': IMAGES})
    assert metrics['skipped'] == 0
  same = lambda path: "['vq']" in path or "['encoder']" in path  # noqa: E731
  for variables in (state.eval_variables, state.variables):
    new = leaves(variables)
    assert {p for p in new if new[p] == old[p]} == set(filter(same, new))


def test_a_frozen_encoder_keeps_the_scales_of_its_tokens(make_step_config):
  fields = {'model.quantizer': 'multiscale', 'freeze': 'encoder,codes'}
  run, other = (
    Run(make_step_config(SMALL | fields | {'model.sides': sides}))
    for sides in ((1, 3, 4), (1, 2, 4))
  )
  model = types.SimpleNamespace(
    variables=jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype), other.template.variables
    ),
    config=other.config,
    step=1,
    model_hash='0' * 64,
    sides=(1, 2, 4),
  )
  other._given = run._given = lambda: model
  other.initial()
  with one_line(r'model.sides: expected \(1, 2, 4\), .*got \(1, 3, 4\)'):
    run.initial()


def test_a_frozen_encoder_uses_stored_statistics_in_training(
  model, make_step_config
):
  x = IMAGES / np.float32(127.5) - 1

  def latents(freeze, train):
    built = Run(make_step_config(SMALL | {'freeze': freeze})).step.model
    call = functools.partial(built.apply, method='latents', mutable=True)
    return call(model.variables, x, train=train)

  stored, _ = latents('', False)
  (frozen, after), (free, _) = latents('encoder,codes', True), latents('', True)
  np.testing.assert_array_equal(frozen, stored)
  assert np.abs(free - stored).max() > 0.1 * np.abs(stored).max()
  assert leaves(after) == leaves(model.variables)


def test_a_new_run_takes_the_collections_and_nothing_else(
  model, make_step_config
):
  fields = SMALL | {'objective.adversarial_weight': 0.5, 'seed': 5}
  run = Run(make_step_config(fields), init=lambda: model)
  fresh, state = run.init(run.key), run.init(run.key, run.initial())
  for name in ('params', 'batch_stats', 'codebook'):
    assert leaves(getattr(state, name)) == leaves(model.variables[name])
    assert leaves(getattr(state, name)) != leaves(getattr(fresh, name))
  for name in ('params', 'batch_stats'):
    assert leaves(state.averages[name]) == leaves(model.variables[name])
  for name in ('step', 'opt_state', 'discriminator', 'nonfinite_streak'):
    assert leaves(getattr(state, name)) == leaves(getattr(fresh, name))


def test_a_larger_batch_leaves_the_codes_alive(model, make_step_config):
  fields = SMALL | {'batch_size': 32, 'accumulate_steps': 2}
  fields |= {'model.depth': 2, 'model.heads': 4}  # not of this quantizer
  run = Run(make_step_config(fields), init=lambda: model)
  book, old = run.initial()['codebook']['vq'], model.variables['codebook']['vq']
  scales = {'embedding': 1, 'cluster_size': 2, 'embedding_sum': 2}
  for name, scale in scales.items():
    np.testing.assert_array_equal(book[name], scale * old[name])


@pytest.mark.slow
def test_the_decoder_adapts_and_the_tokens_stay(
  tiny_run, tiny_config, tmp_path, caplog
):
  caplog.set_level('INFO')
  tiny_config.num_steps, tiny_config.freeze = 2, 'encoder,codes'
  tiny_config.optimizer.learning_rate = 0.01
  tiny_config.optimizer.schedule = 'constant'  # the same program of any length
  source, workdir = load(tiny_run), tmp_path / 'tuned'
  train(tiny_config, workdir, init=lambda: source)
  tuned = load(workdir)
  ids = source.encode(IMAGES)
  np.testing.assert_array_equal(tuned.encode(IMAGES), ids)
  assert np.any(tuned.decode(ids) != source.decode(ids))
  tiling.save_image(source, IMAGES[0], tmp_path / 'x.npz')
  np.testing.assert_array_equal(
    tiling.load_image(tuned, tmp_path / 'x.npz'),
    to_uint8(tuned.decode(ids[:1]))[0],
  )
  tiny_config.num_steps = 3
  train(tiny_config, workdir, init=lambda: pytest.fail('read again'))
  assert f'--init is not read: {workdir} resumes its own run' in caplog.text
  resumed = load(workdir)
  assert resumed.step == 3
  np.testing.assert_array_equal(resumed.encode(IMAGES), ids)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'model.widths': (8, 8)},
      r'config.model.widths: expected \[8, 8\], got \[4, 4\]; .*params.decoder.'
      r'in.bias: expected \(8,\), got \(4,\).*and \d+ more',
    ),
    (
      {'model.norm': 'group'},
      "norm: expected 'group', got 'batch'.*gn.scale: expected .*, got None",
    ),
    ({'model.activation': 'swish'}, "activation: expected 'swish', got 'leaky"),
    ({'model.cosine': True}, 'config.model.cosine: expected True, got False'),
    (
      {'model.inner_product': True, 'freeze': 'codes'},
      'config.model.inner_product: expected True, got False',
    ),
    ({'model.resize': 'torch'}, "resize: expected 'torch', got 'keys'"),
    ({'model.codebook_size': 16}, r'embedding: expected \(16, 8\), got \(8, 8'),
    ({'model.quantize_after': 2}, 'expected config.model.quantize_after = 0'),
    ({'freeze': 'encoder,codes'}, 'expected a trained encoder, from --init or'),
  ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
  fields, message, model, make_step_config, tmp_path
):
  config, workdir = make_step_config(SMALL | fields), tmp_path / 'new' / 'run'
  init = None if 'encoder' in str(fields) else lambda: model
  with one_line(message):
    train(config, workdir, init=init)
  assert not workdir.parent.exists()
