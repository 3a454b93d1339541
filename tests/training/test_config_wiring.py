"""Every field of a config reaches its layer or step."""

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
from rvq_jax.quantize.registry import QUANTIZERS, make_quantizer
from rvq_jax.training.build import build_model
from rvq_jax.training.config import FIELDS, flatten

# Fields that act only together with another one.
ADVERSARIAL = {'objective.adversarial_weight': 0.5}
NEEDS = {
  'codebook_weight': {'ema': False},
  'inner_product': {'freeze': 'codes'},
  'accumulate_steps': {'batch_size': 16},  # for 8 devices
  'objective.perceptual_weight': {'data.image_size': 32},
  'objective.lecam_weight': ADVERSARIAL,
  'objective.discriminator_learning_rate': ADVERSARIAL,
}
CANNOT = {('residual', 'cosine'), ('multiscale', 'cosine')}
CANNOT |= {(x, 'inner_product') for x in ('residual', 'product', 'multiscale')}
OF_MODEL = [
  name.removeprefix('model.')
  for name in FIELDS
  if name.startswith('model.') and name != 'model.quantize_after'
]


def names_of(module):
  return {field.name for field in dataclasses.fields(module)}


def quantizer_fields(name):
  # The latents have code_dim channels; the quantizer takes them as they come.
  taken = names_of(make_quantizer(name, codebook_size=16)) - {'code_dim'}
  return [f for f in OF_MODEL if f in taken and (name, f) not in CANNOT]


@pytest.fixture(scope='module')
def flat(make_step_config):
  small = {'model.num_res_blocks': 1, 'model.depth': 3}
  return flatten(make_step_config(small))


def build(flat, **values):
  return build_model(
    flat | {n if n in flat else f'model.{n}': x for n, x in values.items()}
  )


def other(flat, field):
  """A value that no layer has by default."""
  value, choices = flat[f'model.{field}'], FIELDS[f'model.{field}'].choices
  if choices or isinstance(value, bool):
    return next(x for x in choices or (False, True) if x != value)
  if field in ('sides', 'widths'):
    return (1, 4)
  return value / 2 if isinstance(value, float) else 2 * value


@functools.cache
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
  options = {'method': call, 'mutable': ['batch_stats', 'codebook']}
  options['rngs'] = {'codebook': jax.random.key(0)}

  def total(x, variables):
    (y, loss), _ = model.apply(variables, x, **options)
    return jnp.mean(y) + loss

  if gradient:
    total = jax.value_and_grad(total, argnums=(0, 1), allow_int=True)
  program = jax.make_jaxpr(total)(x, variables)
  text = f'{program} {program.consts}'  # of multi-scale: its matrices
  return modules, re.sub(' at 0x[0-9a-f]+', '', text)


def quantize(model, z):
  out = model.vq(z, train=True)
  return out.quantized, out.loss


def reconstruct(model, images):
  out = model(images, train=True)
  return out.reconstruction, out.quantizer.loss


def values_of(modules, field):
  return {getattr(m, field) for m in modules if field in names_of(m)}


@pytest.mark.parametrize(
  ('name', 'field'),
  [(name, field) for name in QUANTIZERS for field in quantizer_fields(name)],
)
def test_a_field_reaches_the_quantizer(name, field, flat):
  base, value = {'quantizer': name}, other(flat, field)
  base |= {} if name == 'simvq' else NEEDS.get(field, {})
  one, two = build(flat, **base), build(flat, **base | {field: value})
  run = functools.partial(trace, call=quantize, shape=(2, 4, 4, 8))
  modules, _ = run(two, gradient=False)
  assert values_of(modules, field) == {value}
  default = make_quantizer(name, codebook_size=2)
  assert type(two.vq) is type(default) and getattr(default, field) != value
  assert any(  # a gradient takes three times as long
    run(one, gradient=gradient)[1] != run(two, gradient=gradient)[1]
    for gradient in (False, True)
  )


@pytest.mark.parametrize(
  'field', [f for f in OF_MODEL if f in names_of(Encoder) | names_of(Decoder)]
)
def test_a_field_reaches_the_encoder_and_the_decoder(field, flat):
  want = other(flat, field)
  (_, one), (modules, two) = (
    trace(build(flat, **values), reconstruct, (2, 8, 8, 3))
    for values in ({}, {field: want})
  )
  assert one != two
  want = jnp.bfloat16 if field == 'dtype' else want
  parts = {'code_dim': ['encoder'], 'num_heads': ['decoder']}
  for part in parts.get(field, ['encoder', 'decoder']):
    layers = [m for m in modules if m.path[:1] == (part,)]
    assert values_of(layers, field) == {want}


@pytest.mark.parametrize('part', [*QUANTIZERS, 'encoder', 'decoder'])
def test_the_defaults_of_layers_equal_those_of_the_config(part, load_config):
  config = load_config('cifar10').model
  if part in QUANTIZERS:
    layer = make_quantizer(part, codebook_size=config.codebook_size)
    names = quantizer_fields(part)
  else:
    layer = getattr(VQVAE(), part)
    names = set(OF_MODEL) & names_of(layer) - {'dtype'}
    assert layer.dtype == jnp.float32
  want = {name: config[name] for name in names}
  if part == 'simvq':
    want['estimator'] = 'ste'  # the published method
  assert {name: getattr(layer, name) for name in names} == want


@pytest.fixture(scope='module')
def run_program(make_step_config, lpips_stand_in):
  """Returns a function of pairs: the program of a run's step with fields."""

  @functools.cache
  def program(*pairs):
    run = Run(make_step_config(dict(pairs)))
    side = run.config['data.image_size']
    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.uint8)
    step = functools.partial(run.train_step, 1)
    return str(jax.make_jaxpr(step)(run.template, {'image': images}))

  return program


HALF = (
  'optimizer.learning_rate optimizer.weight_decay optimizer.clip_norm '
  'optimizer.b2 optimizer.params_ema objective.perceptual_weight '
  'objective.adversarial_weight objective.lecam_weight '
  'objective.discriminator_learning_rate'
).split()
CHANGES = [
  *((field, 0.5) for field in HALF),
  ('optimizer.schedule', 'constant'),
  ('optimizer.warmup_steps', 2),
  ('objective.pixel', 'l1'),
  ('data.flip', False),
  ('data.colors', True),
  ('seed', 1),
  ('accumulate_steps', 2),
  ('model.estimator', 'ste'),
  ('model.quantize_after', 1),
  ('freeze', 'codes'),
  ('freeze', 'encoder'),
  ('freeze', 'encoder,codes'),
]


@pytest.mark.parametrize(('field', 'value'), CHANGES)
def test_a_field_changes_the_train_step_of_a_run(field, value, run_program):
  base = NEEDS.get(field, {}).items()
  assert run_program(*base, (field, value)) != run_program(*base)


def test_every_field_of_optimizer_and_objective_has_a_case():
  groups = 'optimizer.', 'objective.'
  assert {f for f in FIELDS if f.startswith(groups)} <= dict(CHANGES).keys()


def test_the_seed_chooses_parameters_and_order(make_step_config):
  one, two = (Run(make_step_config({'seed': s})) for s in (0, 1))
  kernels = (run.init(run.key).params['decoder']['in'] for run in (one, two))
  assert np.all(np.not_equal(*(np.asarray(x['kernel']) for x in kernels)))
  assert np.any(next(one.loader)['image'] != next(two.loader)['image'])
