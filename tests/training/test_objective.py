"""Runs with an objective: what is refused, phases, resume, LPIPS' weights."""

from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line
from tiny_step import Run, run_until

from rvq_jax.models import lpips_weights
from rvq_jax.training import loop
from rvq_jax.training.writers import read_jsonl

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def perceptual(tiny_config, lpips_stand_in):
  tiny_config.data.image_size = 32
  tiny_config.objective.perceptual_weight = 0.5
  return tiny_config


@pytest.fixture
def adversarial(tiny_config):
  """D is updated from step 8 of 30 on, and counts from step 12 on."""
  tiny_config.num_steps, tiny_config.log_every = 30, 1
  tiny_config.eval_every = tiny_config.checkpoint_every = 0
  tiny_config.objective.adversarial_weight = 0.5
  return tiny_config


@pytest.mark.slow
def test_the_weights_of_lpips_are_an_argument_and_not_in_the_state(perceptual):
  run, leaves = Run(perceptual), {}
  images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
  _, first = run.train_step(1, run.init(run.key), {'image': images})
  run.lpips_weights = {'scale': np.float32(6.0)}
  _, second = run.train_step(1, run.init(run.key), {'image': images})
  np.testing.assert_allclose(second['lpips'], 3 * first['lpips'], rtol=1e-5)
  np.testing.assert_allclose(first['lpips'], 2 * first['mse'], rtol=1e-5)
  want = first['mse'] + 0.5 * first['lpips'] + first['commitment_loss']
  np.testing.assert_allclose(first['loss'], want, rtol=1e-5)
  for weight in (0.0, 0.5):
    perceptual.objective.perceptual_weight = weight
    leaves[weight] = jax.tree.map(lambda x: x.shape, Run(perceptual).template)
  assert leaves[0.0] == leaves[0.5]


def test_missing_weights_end_the_run_before_it_starts(
  perceptual, tmp_path, monkeypatch
):
  load = mock.Mock(side_effect=ImportError('LPIPS needs its weights'))
  monkeypatch.setattr(lpips_weights, 'load', load)
  with one_line('needs its weights', ImportError):
    loop.train(perceptual, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_run_is_adversarial_from_the_step_that_the_schedule_says(adversarial):
  for weight, want in ((0.5, [*range(8, 31)]), (0.0, [])):
    adversarial.objective.adversarial_weight = weight
    run = Run(adversarial)
    assert [i for i in range(1, 31) if run.phase(i).adversarial] == want
    assert (run.template.discriminator is None) == (not want)


def test_a_discriminator_of_images_not_quantized_is_refused(adversarial):
  adversarial.model.quantize_after = 7
  Run(adversarial)
  adversarial.model.quantize_after = 8
  with one_line('quantize_after: expected at most 7'):
    Run(adversarial)


@pytest.mark.slow
def test_a_run_logs_the_discriminator_and_the_ramp(adversarial, tmp_path):
  loop.train(adversarial, tmp_path)
  adversarial.num_steps = 300  # a longer run keeps its ramp
  run_until(adversarial, tmp_path, 32)
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  logged = {r['step']: r for r in records if 'train/loss' in r}
  names = ('discriminator_loss', 'logits_real', 'logits_fake', 'lecam')
  for step, record in logged.items():
    assert [f'train/{n}' in record for n in names] == 4 * [step >= 8]
  ramp = [logged[i]['train/adversarial_ramp'] for i in (11, 12, 13, 14, 30, 32)]
  np.testing.assert_allclose(ramp, [0, 1 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)
