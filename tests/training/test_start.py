"""The state that a run starts from."""

import numpy as np
import pytest

from rvq_jax.training.loop import train
from rvq_jax.training.run import Run


@pytest.mark.parametrize('microbatches', [1, 2])
def test_random_codes_expect_the_mean_count_of_the_training_batch(
  tiny_config, microbatches
):
  tiny_config.batch_size, tiny_config.accumulate_steps = 16, microbatches
  tiny_config.model.init_from = 'normal'
  run = Run(tiny_config)
  book = run.init(run.key).codebook['vq']
  expected = 16 // microbatches * 4 * 4 / 16  # images, positions, K
  np.testing.assert_array_equal(book['cluster_size'], np.full(16, expected))
  np.testing.assert_allclose(
    book['embedding_sum'], expected * np.asarray(book['embedding']), rtol=1e-6
  )


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_learned_codes_that_are_frozen_on_resume_stay(
  tiny_config, tmp_path, final_bits
):
  tiny_config.model.ema = False
  tiny_config.num_steps = 2
  train(tiny_config, tmp_path)
  before = final_bits(tiny_config, tmp_path)
  tiny_config.num_steps, tiny_config.model.freeze = 4, True
  train(tiny_config, tmp_path)
  after = final_bits(tiny_config, tmp_path)
  assert before['.step'] != after['.step']
  codes = ".params['vq']['embedding']"
  assert before[codes] == after[codes]
  kernel = ".params['encoder']['conv0']['kernel']"
  assert before[kernel] != after[kernel]
