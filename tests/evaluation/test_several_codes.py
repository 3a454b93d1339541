"""Runs with several codes a position, from config to tokens."""

import numpy as np
import pytest

from rvq_jax import load
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.training.loop import train


@pytest.mark.slow
@pytest.mark.parametrize('name', ['residual', 'product'])
def test_a_run_trains_evaluates_and_decodes_its_tokens(
  name, tiny_config, tmp_path
):
  tiny_config.num_steps = 3
  tiny_config.model.quantizer = name
  tiny_config.model.depth = tiny_config.model.heads = 2
  train(tiny_config, tmp_path)
  result = evaluate_run(tmp_path)
  assert result['bits_per_image'] == 4 * 4 * 2 * 4  # positions, codes, log2 K
  assert 0 < result['usage'] <= 1 and result['perplexity'] <= 16

  tokenizer = load(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  ids = tokenizer.encode(images)
  assert ids.shape == (3, 4, 4, 2)
  whole = np.asarray(tokenizer.reconstruct(images))
  np.testing.assert_array_equal(tokenizer.decode(ids), whole)
  if name == 'residual':
    coarse = np.asarray(tokenizer.decode(ids[..., :1]))
    assert coarse.shape == whole.shape and np.any(coarse != whole)
  else:
    with pytest.raises(ValueError, match='expected ids'):
      tokenizer.decode(ids[..., :1])
  with pytest.raises(ValueError, match=r'\[B, H, W, L\]'):
    tokenizer.decode(ids[..., 0])
