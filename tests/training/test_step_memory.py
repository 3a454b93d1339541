"""The ImageNet step at batch 128: nothing of size N x K."""

import math
import re

import jax
import jax.numpy as jnp

from rvq_jax.training import config as config_lib
from rvq_jax.training.optimizer import make_optimizer
from rvq_jax.training.state import create_state
from rvq_jax.training.step import make_train_step

BATCH, SIDE = 128, 256


def test_no_array_of_the_step_has_a_number_for_each_vector_and_code(
  load_config,
):
  config = load_config('imagenet')
  config.model.num_res_blocks = 1  # blocks are alike
  flat = config_lib.check_config(config)
  model = config_lib.build_model(flat)
  optimizer = make_optimizer(2e-4, weight_decay=0.01)
  state = jax.eval_shape(
    lambda key: create_state(
      model, optimizer, key, image_size=SIDE, batch_size=BATCH
    ),
    jax.random.key(0),
  )
  images = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.uint8)
  step = jax.jit(make_train_step(model, optimizer))
  text = step.lower(state, {'image': images}).as_text()
  sizes = {
    math.prod(map(int, shape.split('x')))
    for shape in re.findall(r'tensor<((?:\d+x)*\d+)x\w+>', text)
  }
  vectors = BATCH * (SIDE // flat['model.factor']) ** 2
  assert BATCH * SIDE * SIDE * 3 in sizes  # the shapes were found
  assert max(sizes) < vectors * flat['model.codebook_size']


def test_making_the_state_takes_no_memory_for_the_batch(load_config):
  flat = config_lib.check_config(load_config('photos'))
  model = config_lib.build_model(flat)
  optimizer = make_optimizer(2e-4, weight_decay=0.01)

  def memory(batch_size):
    make = jax.jit(
      lambda key: create_state(
        model, optimizer, key, image_size=64, batch_size=batch_size
      )
    )
    compiled = make.lower(jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(1000) == memory(1)
