"""Every field of a config reaches what it is for."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import Run

from rvq_jax import VQVAE
from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder
from rvq_jax.quantize.registry import make_quantizer
from rvq_jax.training.build import build_model
from rvq_jax.training.config import FIELDS, check_config

QUANTIZERS = FIELDS['model.quantizer'].choices
# A value of each field of a model that is no default of any class.
OTHER = {
  'widths': (6, 8),
  'factor': 4,
  'num_res_blocks': 2,
  'num_heads': 4,
  'code_dim': 12,
  'quantizer': 'simvq',
  'dtype': 'bfloat16',
  'remat': True,
  'norm': 'group',
  'activation': 'swish',
  'codebook_size': 32,
  'estimator': 'reflection',
  'ema': False,
  'decay': 0.75,
  'eps': 1e-3,
  'commitment_weight': 0.5,
  'codebook_weight': 3.0,
  'loss_form': 'paper_eq5',
  'cosine': True,
  'dead_code_threshold': 0.25,
  'split_by': 'distortion',
  'split_fraction': 0.7,
  'init_from': 'normal',
  'max_scale': 1.5,
  'depth': 3,
  'heads': 4,
  'sides': (1, 4),
  'temperature_steps': 77,
  'kl_weight': 0.125,
}
# Fields that act only together with another one.
NEEDS = {
  'codebook_weight': {'ema': False},
  'optimizer.codebook_learning_rate': {'model.ema': False},
  'accumulate_steps': {'batch_size': 16},  # for 8 devices
  'objective.perceptual_weight': {'data.image_size': 32},
  'objective.lecam_weight': {'objective.adversarial_weight': 0.5},
  'objective.discriminator_learning_rate': {
    'objective.adversarial_weight': 0.5
  },
}
CANNOT = {('residual', 'cosine'), ('multiscale', 'cosine')}
OF_STEP = {'quantize_after'}  # see test_quantize_after.py
OF_MODEL = [
  f[6:] for f in FIELDS if f.startswith('model.') and f[6:] not in OF_STEP
]


def fields_of(module):
  return {field.name for field in dataclasses.fields(module)}


def quantizer_fields(name):
  layer = make_quantizer(name, codebook_size=16)
  # The latents have code_dim channels; the quantizer takes them as they come.
  taken = fields_of(layer) - {'code_dim'}
  return [f for f in OF_MODEL if f in taken and (name, f) not in CANNOT]


@pytest.fixture(scope='module')
def model_of(make_step_config):
  """Returns a function of fields of model that builds the model."""

  def build(**fields):
    fields = {'depth': 2} | fields
    named = {f'model.{name}': value for name, value in fields.items()}
    return build_model(check_config(make_step_config(named)))

  return build


def trace(model, call, shape, gradient=False):
  """The modules of a call of the model, and its program as text."""
  modules = []

  def record(call, arguments, keywords, context):
    modules.append(context.module)
    return call(*arguments, **keywords)

  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = functools.partial(model.init, method=call)
  with nn.intercept_methods(record):
    variables = jax.eval_shape(init, jax.random.key(0), x)

  def total(x, variables):
    y, loss = model.apply(
      variables,
      x,
      method=call,
      mutable=['batch_stats', 'codebook'],
      rngs={'codebook': jax.random.key(0)},
    )[0]
    return jnp.mean(y) + loss

  if gradient:
    total = jax.value_and_grad(total, argnums=(0, 1), allow_int=True)
  text = str(jax.make_jaxpr(total)(x, variables))
  return modules, re.sub(' at 0x[0-9a-f]+', '', text)


def quantize(model, z):
  out = model.vq(z, train=True)
  return out.quantized, out.loss


def reconstruct(model, images):
  out = model(images, train=True)
  return out.reconstruction, out.quantizer.loss


@pytest.fixture(scope='module')
def trace_quantizer(model_of):
  """Returns a function: gradient, fields of model -> `trace` of a quantizer."""

  @functools.cache
  def cached(gradient, items):
    return trace(model_of(**dict(items)), quantize, (2, 4, 4, 8), gradient)

  return lambda gradient, fields: cached(gradient, tuple(fields.items()))


@pytest.mark.parametrize(
  ('name', 'field'),
  [(name, field) for name in QUANTIZERS for field in quantizer_fields(name)],
)
def test_a_field_reaches_the_quantizer(name, field, trace_quantizer):
  base = {'quantizer': name}
  base |= {} if name == 'simvq' else NEEDS.get(field, {})
  changed = base | {field: OTHER[field]}
  modules, _ = trace_quantizer(False, changed)
  found = {getattr(m, field) for m in modules if field in fields_of(m)}
  assert found == {OTHER[field]}
  assert any(  # a gradient takes three times as long
    trace_quantizer(gradient, changed)[1] != trace_quantizer(gradient, base)[1]
    for gradient in (False, True)
  )


@pytest.mark.parametrize(
  'field', [f for f in OF_MODEL if f in fields_of(Encoder) | fields_of(Decoder)]
)
def test_a_field_reaches_the_encoder_and_the_decoder(field, model_of):
  base, images = {'num_res_blocks': 1}, (2, 8, 8, 3)
  _, one = trace(model_of(**base), reconstruct, images)
  modules, other = trace(
    model_of(**base | {field: OTHER[field]}), reconstruct, images
  )
  assert one != other
  want = jnp.bfloat16 if field == 'dtype' else OTHER[field]
  parts = {'code_dim': ['encoder'], 'num_heads': ['decoder']}
  for part in parts.get(field, ['encoder', 'decoder']):
    own = [m for m in modules if m.path[:1] == (part,)]
    found = {getattr(m, field) for m in own if field in fields_of(m)}
    assert found == {want}


@pytest.mark.parametrize('name', QUANTIZERS)
def test_the_name_chooses_the_quantizer(name, model_of):
  model = model_of(quantizer=name)
  class_of = type(model.vq)
  modules, _ = trace(model, reconstruct, (2, 8, 8, 3))
  assert {type(m) for m in modules if m.path == ('vq',)} == {class_of}
  others = {type(model_of(quantizer=n).vq) for n in QUANTIZERS}
  assert len(others) == len(QUANTIZERS)
  assert class_of.__name__.lower().startswith({'vq': 'vector'}.get(name, name))


@pytest.mark.parametrize('name', QUANTIZERS)
def test_a_quantizers_defaults_are_those_of_the_config(name, load_config):
  config = load_config('cifar10').model
  want = {field: config[field] for field in quantizer_fields(name)}
  if name == 'simvq':
    want['estimator'] = 'ste'  # the published method
  layer = make_quantizer(name, codebook_size=16384)
  assert {field: getattr(layer, field) for field in want} == want


def test_a_models_defaults_are_those_of_the_config(load_config):
  config = load_config('cifar10').model
  for part in (VQVAE().encoder, VQVAE().decoder):
    names = set(OF_MODEL) & fields_of(part) - {'dtype'}
    want = {field: config[field] for field in names}
    assert {field: getattr(part, field) for field in names} == want
    assert part.dtype == jnp.float32
  assert VQVAE().vq.codebook_size == config.codebook_size


def test_every_field_of_a_model_belongs_to_some_part():
  known = fields_of(Encoder) | fields_of(Decoder) | {'quantizer'}
  known = known.union(*map(quantizer_fields, QUANTIZERS))
  assert set(OF_MODEL) == set(OTHER)
  assert set(OF_MODEL) <= known


# The object that a run is made of.


@pytest.fixture(scope='module')
def run_program(make_step_config, lpips_stand_in):
  """Returns a function of fields: the program of a run's train step."""

  @functools.cache
  def program(items):
    run = Run(make_step_config(dict(items)))
    side = run.config['data.image_size']
    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.uint8)
    step = functools.partial(run.train_step, 1)
    return str(jax.make_jaxpr(step)(run.template, {'image': images}))

  return lambda **fields: program(tuple(fields['fields'].items()))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('optimizer.learning_rate', 1e-3),
    ('optimizer.codebook_learning_rate', 1e-3),
    ('optimizer.weight_decay', 0.5),
    ('optimizer.schedule', 'constant'),
    ('optimizer.warmup_steps', 2),
    ('optimizer.clip_norm', 0.5),
    ('optimizer.b2', 0.5),
    ('optimizer.params_ema', 0.5),
    ('objective.pixel', 'l1'),
    ('objective.perceptual_weight', 0.5),
    ('objective.adversarial_weight', 0.5),
    ('objective.lecam_weight', 0.5),
    ('objective.discriminator_learning_rate', 0.5),
    ('data.flip', False),
    ('data.colors', True),
    ('seed', 1),
    ('accumulate_steps', 2),
    ('model.estimator', 'ste'),
    ('model.quantize_after', 1),
    ('freeze', 'codes'),
    ('freeze', 'encoder,codes'),
  ],
)
def test_a_field_changes_the_train_step_of_a_run(field, value, run_program):
  base = NEEDS.get(field, {})
  assert run_program(fields=base | {field: value}) != run_program(fields=base)


def test_every_field_of_optimizer_and_objective_has_a_case():
  mark = test_a_field_changes_the_train_step_of_a_run.pytestmark[0]
  tried = {field for field, _ in mark.args[1]}
  groups = ('optimizer.', 'objective.')
  assert {f for f in FIELDS if f.startswith(groups)} <= tried


def test_the_seed_chooses_parameters_and_order(make_step_config):
  runs = [Run(make_step_config({'seed': s})) for s in (0, 1)]
  kernels, orders = [], []
  for run in runs:
    params = run.init(run.key).params
    kernels.append(np.asarray(params['encoder']['conv0']['kernel']).tobytes())
    orders.append(next(run.loader)['image'].tobytes())
  assert kernels[0] != kernels[1]
  assert orders[0] != orders[1]
