"""A run that starts from a trained model, and what it leaves as it was."""

import functools
import re
import shlex
import types

import jax
import numpy as np
import pytest
from absl import flags
from errors import one_line
from ml_collections import config_flags
from tiny_step import Run, run_until
from tiny_step import named_bits as leaves

from rvq_jax import load
from rvq_jax.commands import program  # noqa: F401  reads flags of a config
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer import tiling
from rvq_jax.training.loop import train

pytestmark = pytest.mark.usefixtures('one_device')
NEW = {'freeze': 'encoder,codes'}  # without --init
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
SMALL = {
  'model.widths': (4, 4),  # the decoder, too, has BatchNorm
  'optimizer.learning_rate': 0.01,
  'optimizer.weight_decay': 0.5,
  'optimizer.params_ema': 0.9,
}
VQGAN = {
  'model.network': 'vqgan',
  'model.ch': 32,
  'model.ch_mult': (1, 1),
  'model.z_channels': 8,
}


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope='module')
def make_model(make_step_config):
  """Returns a function: fields -> parts of a tokenizer, of no initialiser."""

  def make(fields):
    run, rng = Run(make_step_config(fields)), np.random.default_rng(1)
    draw = lambda x: rng.uniform(0.5, 1, x.shape).astype('f')  # noqa: E731
    variables = jax.tree.map(draw, run.template.variables)
    book = variables['codebook']['vq']
    book['embedding'] = rng.normal(size=(8, 8)).astype('f')
    return types.SimpleNamespace(
      model=run.step.model,
      variables=variables,
      config=run.config,
      step=1,
      model_hash='0' * 64,
      sides=None,
    )

  return make


@pytest.fixture(scope='module')
def model(make_model):
  return make_model(SMALL)


@pytest.mark.parametrize(
  ('freeze', 'ema', 'kept'),
  [
    ('codes', False, ("['vq']",)),
    ('encoder', True, ("['encoder']",)),
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
  ('quantizer', 'freeze', 'kept'),
  [
    ('vq', 'encoder,codes', ("['vq']", "['encoder']")),
    slow('vq', 'encoder', ("['encoder']",)),
    slow('gumbel', 'encoder,codes', ("['vq']", "['encoder']")),
  ],
)
def test_what_is_frozen_on_resume_stays_in_every_copy(
  quantizer, freeze, kept, make_step_config
):
  fields = SMALL | {'model.quantizer': quantizer}
  run = Run(make_step_config(fields | {'freeze': freeze}))
  state = Run(make_step_config(fields)).init(run.key)
  state = state.replace(  # parameters and averages differ, as after some steps
    averages=jax.tree.map(lambda x: 0.9 * x, state.averages),
    codebook=jax.tree.map(lambda x: x + 1, state.codebook),
  )
  old = leaves(state.eval_variables)
  for i in range(3):
    state, metrics = run.train_step(i + 1, state, {'image': IMAGES})
    assert metrics['skipped'] == 0
  same = lambda path: any(part in path for part in kept)  # noqa: E731
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
    model=other.step.model,
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


SWAP = SMALL | {'freeze': 'encoder'}


@pytest.mark.parametrize(
  ('fields', 'shape'),
  [
    slow({'model.codebook_size': 16}, (4, 4)),
    ({'model.quantizer': 'residual', 'model.depth': 2}, (4, 4, 2)),
    slow({'model.ema': False}, (4, 4)),
    slow({'model.cosine': True}, (4, 4)),
    slow({'model.quantizer': 'multiscale', 'model.sides': (1, 4)}, (17,)),
    slow({'model.quantizer': 'product'}, (4, 4, 2)),
    slow({'model.quantizer': 'fsq'}, (4, 4)),
    slow({'model.quantizer': 'gumbel'}, (4, 4)),
    slow({'model.quantizer': 'simvq'}, (4, 4)),
    slow(VQGAN | {'model.quantizer': 'residual'}, (4, 4, 4)),
  ],
)
def test_another_quantizer_learns_behind_the_encoder_of_a_trained_model(
  fields, shape, make_model, make_step_config
):
  source = make_model(SMALL | {n: x for n, x in fields.items() if n in VQGAN})
  run = Run(make_step_config(SWAP | fields), init=lambda: source)
  state = run.init(run.key, run.initial())
  old, first = leaves(source.variables), leaves(state.variables)
  new = {name for name in first if first[name] != old.get(name)}
  assert new == {name for name in first if "['vq']" in name}
  simvq = 'simvq' in fields.values()  # moves a map in place of its codes
  drawn = "['codebook']['vq']['embedding']" if simvq else None
  for i in range(3):
    state, metrics = run.train_step(i + 1, state, {'image': IMAGES})
    assert metrics['skipped'] == 0
  for variables in (state.variables, state.eval_variables):
    now = leaves(variables)
    same = {n for n in now if now[n] == first[n]}
    assert same == {n for n in now if "['encoder']" in n or n == drawn}
  sizes = [x for n, x in now.items() if 'cluster_size' in n]
  assert all(np.frombuffer(x, 'f').min() > 0 for x in sizes)
  x, apply = IMAGES / np.float32(127.5) - 1, run.step.model.apply
  assert apply(state.eval_variables, x, method='encode').shape == (8, *shape)


def test_the_same_quantizer_is_not_a_new_one(model, make_step_config):
  fields = {'model.depth': 2, 'model.decay': 0.5, 'model.estimator': 'ste'}
  run = Run(make_step_config(SWAP | fields), init=lambda: model)
  assert leaves(run.initial()) == leaves(model.variables)


def test_the_flags_of_a_refusal_are_those_to_type(
  model, make_model, make_step_config
):
  other = make_model(SMALL | VQGAN)
  fields = {'model.attn_levels': (1,), 'model.codebook_size': 16}
  for freeze in ('', 'encoder'):
    config = make_step_config(SMALL | fields | {'freeze': freeze})
    with one_line('is not the one that') as told:
      Run(config, init=lambda: other).initial()
    typed = shlex.split(re.search(r'type (--.*)', str(told.value))[1])
    assert '--config.model.attn_levels=None' in typed
    assert any('codebook_size' in flag for flag in typed) == (not freeze)
    values, words = flags.FlagValues(), ['', *typed]
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=words
    )
    values(words)
    Run(config, init=lambda: other).initial()


@pytest.mark.slow
def test_a_run_with_another_quantizer_resumes_to_the_same_bits(
  tiny_run, tiny_config, tmp_path, final_bits
):
  tiny_config.freeze, tiny_config.model.quantizer = 'encoder', 'residual'
  source, whole, cut = load(tiny_run), tmp_path / 'whole', tmp_path / 'cut'
  train(tiny_config, whole, init=lambda: source)
  run_until(tiny_config, cut, 4, init=lambda: source)
  train(tiny_config, cut)
  assert final_bits(tiny_config, cut) == final_bits(tiny_config, whole)
  x = IMAGES / np.float32(127.5) - 1
  latents = [
    leaves(m.model.apply(m.variables, x, method='latents'))
    for m in (source, load(cut))
  ]
  assert latents[0] == latents[1]


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
  assert f'--init is ignored: {workdir} resumes its own run' in caplog.text
  resumed = load(workdir)
  assert resumed.step == 3
  np.testing.assert_array_equal(resumed.encode(IMAGES), ids)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'model.widths': (8, 8)},
      r'attention.norm.scale: expected \(8,\), got \(4,\).*and \d+ more; '
      r"type '--config.model.widths=\(4, 4\)'$",
    ),
    (
      {'model.norm': 'group'},
      'gn.scale: expected .*, got None.*type --config.model.norm=batch$',
    ),
    (
      {'model.activation': 'swish'},
      'type --config.model.activation=leaky_relu',
    ),
    (
      {'model.cosine': True},
      'type --config.model.cosine=False, or --config.fr',
    ),
    (
      {'model.codebook_size': 16},
      r'embedding: expected \(16, 8\), got \(8, 8.*type --config.model.codebook'
      '_size=8, or --config.freeze=encoder to train a new quantizer',
    ),
    (
      {'freeze': 'encoder', 'model.widths': (8, 8), 'model.codebook_size': 16},
      r"and \d+ more; type '--config.model.widths=\(4, 4\)'$",
    ),
    ({'freeze': 'encoder', 'model.activation': 'swish'}, 'type .*=leaky_relu$'),
    (
      {'model.inner_product': True, 'freeze': 'codes'},
      'type --config.model.inner_product=False',
    ),
    ({'model.quantize_after': 2}, 'expected config.model.quantize_after = 0'),
    (NEW, 'expected a trained encoder, got a new run: add --init'),
  ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
  fields, message, model, make_step_config, tmp_path
):
  config, workdir = make_step_config(SMALL | fields), tmp_path / 'new' / 'run'
  init = None if fields == NEW else lambda: model
  with one_line(message):
    train(config, workdir, init=init)
  assert not workdir.parent.exists()
