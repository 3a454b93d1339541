"""Every value that a user can type is checked before anything is built."""

import json
from dataclasses import MISSING

import pytest
from errors import one_line

from rvq_jax.configs import cifar10
from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_model
from rvq_jax.training.config import check_config, check_resume, flatten

FLAT = flatten(cifar10.get_config())
MULTISCALE, FSQ = ({'model.quantizer': name} for name in ('multiscale', 'fsq'))
GROUPS = {'model.norm': 'group', 'model.num_heads': 2}
# Fields that earlier versions had; no trained model depends on them.
REMOVED = {
  'model.eps': 1e-3,
  'model.max_scale': 5.0,
  'model.kl_weight': 0.0,
  'data.in_memory': 'yes',
  'optimizer.codebook_learning_rate': None,
}


@pytest.mark.parametrize(
  ('name', 'tokens'),
  [
    *(('photos', 256), ('photos_vqgan', 256), ('cifar10', 16)),
    *(('cifar10:f4', 64), ('cifar10:best', 16), ('cifar10:f4,best', 64)),
    *(('cifar10:multiscale', 155), ('imagenet', 1024), ('imagenet:best', 1024)),
    *(('imagenet:multiscale', 680), ('imagenet_vqgan', 1024)),
    *(('imagenet_f16', 256), ('tiny_imagenet', 64), ('tiny_imagenet:f4', 256)),
    ('tiny_imagenet:f8,perceptual', 64),
    *(('tiny_imagenet:f8,vqgan', 64), ('tiny_imagenet:f4,vqgan', 256)),
  ],
)
def test_shipped_models_have_their_tokens(name, tokens, load_config):
  flat = check_config(load_config(*name.split(':')))
  assert json.loads(config_lib.to_json(flat)) == flat
  model = build_model(flat)
  sides = getattr(model.vq, 'sides', [flat['data.image_size'] // model.factor])
  assert sum(side**2 for side in sides) == tokens
  assert model.vq.codebook_size == flat['model.codebook_size']


@pytest.mark.parametrize(
  'variants', ['cifar10:f8:best', 'cifar10:f4:f4,best', 'imagenet::best']
)
def test_best_variants_differ_only_in_method(variants, load_config):
  name, *variants = variants.split(':')
  paper, best = (flatten(load_config(name, v)) for v in variants)
  method = 'estimator quantize_after dead_code_threshold commitment_weight'
  method += ' code_dim norm activation'
  different = {field for field in paper if paper[field] != best[field]}
  assert different == {f'model.{field}' for field in method.split()} | {
    f'optimizer.{field}' for field in ('learning_rate', 'warmup_steps', 'b2')
  }
  assert best['model.estimator'] == 'ste'


# Changes of configs/cifar10.py -> start of the message; more in test_fields.py.
REFUSED = [
  ({'model.codebook_size': -5}, 'model.codebook_size: expected .*got -5'),
  ({'model.code_dim': None}, 'model.code_dim: expected a value, got None'),
  ({'model.widths': ()}, 'model.widths: expected integers from 1 to 1048576'),
  ({'model.estimator': 'x'}, 'model.estimator: .*rotation_unscaled, reflect'),
  ({'model.decay': 1.5}, 'model.decay: expected a value from 0 to 1'),
  ({'model.dtype': 'float16'}, 'model.dtype: expected one of float32, bfloat1'),
  ({'data.split': 'train'}, 'data.split: expected one of paper, official'),
  ({'optimizer.b2': float('nan')}, 'optimizer.b2: .*got nan'),
  ({'model.codebok_size': 5}, r'.*; did you mean config.model.codebook_size\?'),
  ({'typo': 1}, 'typo: no such field'),
  # The layers refuse these, together with another field.
  ({'data.image_size': 33}, 'data.image_size: .*multiples of 8, got 33x33'),
  ({'model.num_heads': 7}, 'model.num_heads: .* divisor of the 256 .*got 7'),
  ({'model.quantizer': 'product', 'model.heads': 3}, 'model.*heads.* 256'),
  *(
    ({**MULTISCALE, 'model.sides': sides}, rf'model.*, 4, got \({sides[0]}, ')
    for sides in [(1, 2), (2, 1, 4), (1, 1, 4), (1, 8), (4, 2)]
  ),
  ({**GROUPS, 'model.widths': (30, 130)}, 'model.norm: .* 7 groups .*, got 30'),
  ({'model.inner_product': True}, "model.inner_product: .*freeze='codes' or"),
  ({'model.estimator': 'diveq'}, "model.estimator: 'diveq' .*ema=False"),
  *(
    ({'model.quantizer': name, f'model.{field}': value}, f'model.*{message}')
    for name in ('residual', 'multiscale')
    for field, value, message in [
      ('estimator', 'dynamic_ste', "estimator.*'dynamic_ste'"),
      ('cosine', True, 'cosine=False'),
      ('inner_product', True, 'inner_product=False'),
    ]
  ),
  (
    {**FSQ, 'model.codebook_size': 1000},
    'model.codebook_size: expected a power of two.*got 1000; .*, 1024',
  ),
  # No layer knows these rules.
  *(
    ({'model.quantize_after': 9, **fields}, 'model.quantize_after: expected 0')
    for fields in (FSQ, {'model.init_from': 'normal'})
  ),
  (
    {'objective.perceptual_weight': 1.0, 'data.image_size': 24},
    'data.image_size: expected at least 32 with objective.perceptual_weight',
  ),
]


@pytest.mark.parametrize(('fields', 'message'), REFUSED)
def test_an_impossible_config_ends_in_one_line(fields, message):
  with one_line(f'^config.{message}'):
    check_config(FLAT | fields)


@pytest.mark.parametrize(
  'fields',
  [
    {'model.sides': (1, 2)},  # of another quantizer
    {'model.inner_product': True, 'freeze': 'codes'},
    {**MULTISCALE, 'model.sides': (2, 4)},
    {'objective.perceptual_weight': 1.0},
    {'model.num_res_blocks': 1000},
    {'model.codebook_size': 2**31 - 1},
  ],
)
def test_a_config_at_the_edge_of_the_rules_is_taken(fields):
  check_config(FLAT | fields)


# (least, greatest) value -> fields that belong to no layer.
LIMITS = {
  (0, 1024): 'data.num_workers',
  (0, 2**31 - 1): 'seed eval_every checkpoint_every optimizer.warmup_steps '
  'model.quantize_after',
  (1, 2**31 - 1): 'batch_size accumulate_steps num_steps log_every',
  (1, 10**7): 'num_epochs',
  (1, 10**6): 'keep_checkpoints',
  (1, 2**14): 'data.image_size',
  (1e-3, 1): 'data.crop_scale',
  (0, 0.9999999): 'optimizer.params_ema optimizer.b2',
  (0, float('inf')): 'optimizer.learning_rate optimizer.weight_decay '
  'optimizer.clip_norm objective.perceptual_weight objective.lecam_weight '
  'objective.adversarial_weight objective.discriminator_learning_rate',
}


def test_numbers_have_their_limits():
  for limits, names in LIMITS.items():
    for name in names.split():
      field = config_lib.FIELDS[name]
      assert (field.low, field.high) == limits, name


def test_a_missing_field_is_named():
  given = {name: x for name, x in FLAT.items() if name != 'model.decay'}
  with one_line('^config.model.decay: missing'):
    check_config(given)


def test_the_door_starts_no_backend(run_python):
  # Else `deterministic`, which is set behind it, would come too late.
  done = run_python("""
from jax._src.xla_bridge import backends_are_initialized
from rvq_jax.configs import imagenet  # bfloat16
from rvq_jax.training.config import check_config
check_config(imagenet.get_config())
print(backends_are_initialized())
""")
  assert done.stdout == 'False\n', done.stderr


def test_devices_must_divide_the_batch():
  flat = {'batch_size': 128, 'accumulate_steps': 1}
  config_lib.check_devices(flat, 8)
  with one_line('batch_size: .* multiple of the 3 devices, got 128'):
    config_lib.check_devices(flat, 3)
  with one_line('8 devices x 3 accumulate_steps, got 128'):
    config_lib.check_devices(flat | {'accumulate_steps': 3}, 8)


def test_resume_allows_length_and_logging_and_says_so(caplog):
  caplog.set_level('INFO')
  check_resume(FLAT, FLAT)
  assert not caplog.text
  for name, value in (('num_steps', 7), ('log_every', 3), ('freeze', 'codes')):
    check_resume(FLAT, FLAT | {name: value})
    line = f'config.{name}: checkpoint {value!r}, now {FLAT[name]!r}'
    assert f'resumes with another config: {line}' in caplog.text
  differs = FLAT | {'model.codebook_size': 512, 'data.split': 'official'}
  with one_line(
    "undo: config.data.split: checkpoint 'paper', now 'official'; "
    'config.model.codebook_size: checkpoint 16384, now 512'
  ):
    check_resume(differs, FLAT)


@pytest.mark.parametrize('name', REMOVED)
def test_a_run_of_an_earlier_version_opens_but_is_not_resumed(name):
  old = FLAT | {name: REMOVED[name]}
  for kind in ({}, {'model.quantizer': 'gumbel'}):
    assert build_model(old | kind) == build_model(FLAT | kind)
  with one_line(f'another version .*cannot be resumed.*config.{name}'):
    check_resume(FLAT, old)


# Only these may have no value for the configs that lack them: new fields do.
FIRST = (
  'seed batch_size num_epochs num_steps log_every eval_every checkpoint_every '
  'keep_checkpoints data.name data.data_dir data.split data.image_size '
  'data.crop data.crop_scale data.flip data.num_workers model.quantizer '
  'model.codebook_size model.dtype objective.pixel optimizer.learning_rate '
  'optimizer.weight_decay optimizer.schedule optimizer.warmup_steps '
  'optimizer.clip_norm optimizer.params_ema'
).split()


def test_a_run_from_before_a_field_is_resumed_with_its_value_of_then():
  fields = config_lib.FIELDS.items()
  assert {n for n, f in fields if f.before is MISSING} == set(FIRST)
  old = {name: x for name, x in FLAT.items() if name in FIRST}
  resumed = config_lib.completed(old, 'x')
  check_resume(resumed, old)
  with one_line('undo: config.optimizer.b2: checkpoint 0.999, now 0.5$'):
    check_resume(resumed | {'optimizer.b2': 0.5}, old)


@pytest.mark.parametrize('path', ['set', './set/', '~/set', '{}/x/../set'])
def test_a_folder_is_the_same_however_it_is_named(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  flat = check_config(FLAT | {'data.name': f'folder:{path.format(tmp_path)}'})
  assert flat['data.name'] == f'folder:{tmp_path}/set'
