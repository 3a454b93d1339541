"""Every value that a user can type is checked before anything is built."""

import re

import pytest
from ml_collections import ConfigDict

from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_model


def changed(config, name, value):
  config = config.to_dict()
  *parents, leaf = name.split('.')
  group = config
  for parent in parents:
    group = group[parent]
  group[leaf] = value
  return config


@pytest.mark.parametrize(
  'name',
  [
    *(('photos',), ('cifar10',), ('cifar10', 'f4'), ('imagenet',)),
    *(('cifar10', 'best'), ('cifar10', 'f4,best'), ('imagenet', 'best')),
    *(('photos_vqgan',), ('imagenet_vqgan',)),
    *(('cifar10', 'multiscale'), ('imagenet', 'multiscale')),
  ],
)
def test_shipped_configs_are_valid_and_build(load_config, name):
  flat = config_lib.check_config(load_config(*name))
  model = build_model(flat)
  assert model.vq.codebook_size == flat['model.codebook_size']


@pytest.mark.parametrize(
  ('paper', 'best'),
  [
    (('cifar10', 'f8'), ('cifar10', 'best')),
    (('cifar10', 'f4'), ('cifar10', 'f4,best')),
    (('imagenet',), ('imagenet', 'best')),
  ],
)
def test_best_variants_differ_in_method_alone(load_config, paper, best):
  paper, best = (
    config_lib.check_config(load_config(*name)) for name in (paper, best)
  )
  changed = {name for name in paper if paper[name] != best[name]}
  assert changed == {
    'model.estimator',
    'model.quantize_after',
    'model.dead_code_threshold',
  }
  assert best['model.estimator'] == 'ste'


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('model.codebook_size', -5, 'model.codebook_size: expected .*got -5'),
    ('model.codebook_size', 1.5, 'expected .*got 1.5'),
    ('model.codebook_size', True, 'expected .*got True'),
    ('model.codebook_size', None, 'expected .*got None'),
    ('model.widths', 32, r'as \(64, 128, 256\)'),
    ('model.widths', (), 'integers from 1 to 1048576'),
    ('model.widths', (64, -1), 'integers from 1 to 1048576'),
    ('model.factor', 3, 'one of 2, 4, 8'),
    ('model.sides', (), 'integers from 1 to 1048576'),
    ('model.num_heads', 7, 'a divisor of the last width 256'),
    ('model.estimator', 'straight', 'rotation_unscaled, reflection, ste'),
    ('model.decay', 1.5, 'a value from 0 to 1'),
    ('model.dtype', 'float16', 'float32, bfloat16'),
    ('model.ema', 'yes', 'True or False'),
    ('data.image_size', 33, 'a multiple of model.factor, 8'),
    ('data.split', 'train', 'paper, official'),
    ('data.crop_scale', 0.0, 'data.crop_scale'),
    ('optimizer.learning_rate', float('nan'), 'optimizer.learning_rate'),
    ('optimizer.learning_rate', float('inf'), 'a finite number'),
    ('optimizer.learning_rate', '1e-3', 'a number'),
    ('optimizer.params_ema', 1.0, 'optimizer.params_ema'),
    ('objective.pixel', 'l2', 'one of mse, l1'),
    ('objective.perceptual_weight', -1.0, 'objective.perceptual_weight'),
    ('batch_size', 0, 'at least 1'),
    ('num_steps', 0, 'at least 1'),
    ('seed', -1, 'seed'),
    ('model.codebok_size', 5, r'did you mean config.model.codebook_size\?'),
    ('typo', 1, 'config.typo: no such field'),
  ],
)
def test_impossible_values_end_in_one_line(load_config, name, value, message):
  with pytest.raises(ValueError, match=message) as caught:
    config_lib.check_config(changed(load_config('cifar10'), name, value))
  assert '\n' not in str(caught.value)


# (least, greatest) value -> fields; None: no bound but float32's.
LIMITS = {
  (1, 2**31 - 1): 'batch_size accumulate_steps num_steps log_every '
  'model.codebook_size model.num_heads model.temperature_steps',
  (0, 2**31 - 1): 'seed eval_every checkpoint_every optimizer.warmup_steps',
  (1, 10**7): 'num_epochs',
  (1, 10**6): 'keep_checkpoints',
  (0, 1024): 'data.num_workers',
  (1, 2**14): 'data.image_size',
  (1e-3, 1.0): 'data.crop_scale',
  (0, 1000): 'model.num_res_blocks',
  (1, 2**20): 'model.code_dim',
  (1, 64): 'model.depth model.heads',
  (0.0, 1.0): 'model.decay',
  (1e-30, 1.0): 'model.eps model.split_fraction',
  (1e-30, None): 'model.max_scale',
  (0.0, None): 'model.commitment_weight model.codebook_weight model.kl_weight '
  'model.dead_code_threshold optimizer.learning_rate optimizer.weight_decay '
  'optimizer.clip_norm objective.perceptual_weight '
  'objective.adversarial_weight objective.lecam_weight '
  'objective.discriminator_learning_rate',
  (0.0, 0.9999999): 'optimizer.params_ema optimizer.b2',
}


@pytest.mark.parametrize(
  ('name', 'low', 'high'),
  [
    (name, *limits)
    for limits, names in LIMITS.items()
    for name in names.split()
  ],
)
def test_a_number_is_taken_up_to_its_limits(load_config, name, low, high):
  limits = f'{name}: expected (at least|a value from|a finite number)'

  def refused(value):
    try:
      config_lib.check_config(changed(load_config('cifar10'), name, value))
    except ValueError as error:  # another field may not fit to this one
      return re.search(limits, str(error)) is not None
    return False

  high = 3e38 if high is None else high
  whole = isinstance(high, int)
  assert not refused(low)
  assert not refused(high)
  assert refused(low - 1 if whole else 0.5 * low - 1e-36)
  assert refused(high + 1 if whole else 1.2 * high)


def test_a_missing_field_is_named(load_config):
  config = load_config('cifar10').to_dict()
  del config['model']['decay']
  with pytest.raises(ValueError, match='config.model.decay: missing'):
    config_lib.check_config(config)


def test_a_perceptual_loss_of_small_images_is_refused(load_config):
  config = load_config('cifar10')
  config.objective.perceptual_weight = 1.0
  config_lib.check_config(config)  # 32 pixels
  config.data.image_size = 24
  with pytest.raises(ValueError, match='image_size: expected at least 32'):
    config_lib.check_config(config)


def test_a_set_in_memory_cannot_be_cropped_at_random(load_config):
  config = load_config('imagenet')
  config.data.in_memory = 'yes'
  with pytest.raises(ValueError, match='in_memory'):
    config_lib.check_config(config)


def test_devices_must_divide_the_batch():
  config_lib.check_devices(128, 8)
  with pytest.raises(ValueError, match='multiple of the 3 devices, got 128'):
    config_lib.check_devices(128, 3)
  with pytest.raises(ValueError, match='8 devices x 3 accumulate_steps'):
    config_lib.check_devices(128, 8, accumulate_steps=3)


def test_resume_allows_length_and_logging_and_nothing_else(load_config):
  old = config_lib.check_config(load_config('cifar10'))
  for name, value in (('num_steps', 7), ('log_every', 3), ('num_epochs', 1)):
    config_lib.check_resume(old | {name: value}, old)
  differs = old | {'model.codebook_size': 512, 'data.split': 'official'}
  differs['objective.pixel'] = 'l1'
  with pytest.raises(ValueError) as caught:
    config_lib.check_resume(differs, old)
  message = str(caught.value)
  assert 'config.model.codebook_size: checkpoint 16384, now 512' in message
  assert "config.data.split: checkpoint 'paper', now 'official'" in message
  assert "config.objective.pixel: checkpoint 'mse', now 'l1'" in message


def test_flat_config_survives_json(load_config):
  flat = config_lib.check_config(ConfigDict(load_config('cifar10')))
  assert config_lib.json.loads(config_lib.to_json(flat)) == flat


@pytest.mark.parametrize(
  'path', ['set', 'set/', './set', '~/set', '{}/x/../set']
)
def test_a_folder_is_the_same_however_it_is_named(
  path, load_config, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  config = load_config('cifar10')
  config.data.name = f'folder:{path.format(tmp_path)}'
  flat = config_lib.check_config(config)
  assert flat['data.name'] == f'folder:{tmp_path}/set'


@pytest.mark.parametrize(
  'sides', [(1, 2), (2, 1, 4), (1, 1, 4), (1, 8), (4, 2)]
)
def test_sides_of_another_grid_are_refused(sides, load_config):
  config = load_config('cifar10')
  config.model.sides = sides
  config_lib.check_config(config)  # of another quantizer
  config.model.quantizer = 'multiscale'
  with pytest.raises(
    ValueError, match=r'the grid, 4 of 32 .*as \(1, 2, 3, 4\)'
  ):
    config_lib.check_config(config)


def test_sides_are_those_of_the_grid_or_ones_own(load_config):
  config = load_config('cifar10', 'f4')
  config.model.quantizer = 'multiscale'
  for own, want in ((None, (1, 2, 3, 4, 5, 6, 8)), ((2, 8), (2, 8))):
    config.model.sides = own
    flat = config_lib.check_config(config)
    assert build_model(flat).vq.sides == want


def test_multiscale_takes_estimators_of_several_codes_alone(load_config):
  config = load_config('cifar10')
  config.model.quantizer, config.model.estimator = 'multiscale', 'dynamic_ste'
  with pytest.raises(ValueError, match='as model.quantizer = multiscale has'):
    config_lib.check_config(config)


@pytest.mark.parametrize(
  ('name', 'tokens'), [('cifar10', 155), ('imagenet', 680)]
)
def test_multiscale_configs_have_the_tokens_that_they_say(
  name, tokens, load_config
):
  flat = config_lib.check_config(load_config(name, 'multiscale'))
  sides = build_model(flat).vq.sides
  assert sum(side**2 for side in sides) == tokens
