"""encode and decode as StableHLO; writing needs the extra `stablehlo`."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp

from rvq_jax.metrics import prepare_images
from rvq_jax.tokenizer.tokenizer import Tokenizer

PLATFORMS = ('cpu', 'cuda')
# An export in bfloat16 on a GPU calls cuDNN in `layers.attend`, under a name
# that JAX does not guarantee.
_CHECKS = (jax.export.DisabledSafetyCheck.custom_call('__cudnn$fmhaSoftmax'),)


def write_stablehlo(folder, tokenizer: Tokenizer) -> None:
  """Writes encode_PLATFORM.stablehlo and decode_PLATFORM.stablehlo.

  Each holds its arrays, and the model's choices for its platform, which this
  machine need not have. It maps over single images: their number B is free,
  their side S is `image_size`.

  encode: uint8 [B, S, S, 3] -> ids int32 [B, H, W], or [B, H, W, L].
  decode: such ids -> float32 [B, S, S, 3] in [-1, 1].
  """
  if not importlib.util.find_spec('flatbuffers'):
    raise ImportError(
      '--stablehlo needs the extra stablehlo: pip install flatbuffers'
    )
  model, side = tokenizer.model, tokenizer.image_size

  def encode(variables, image):
    images = prepare_images(image[None])
    return model.apply(variables, images, method='encode')[0]

  def decode(variables, ids):
    return model.apply(variables, ids[None], method='decode')[0]

  def over_images(function, x):
    # Without barriers XLA folds the weights while it compiles.
    variables = jax.tree.map(jax.lax.optimization_barrier, tokenizer.variables)
    return jax.lax.map(functools.partial(function, variables), x)

  image = jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)
  ids = jax.eval_shape(encode, tokenizer.variables, image)
  (batch,) = jax.export.symbolic_shape('b')
  for platform in PLATFORMS:
    for function, one in ((encode, image), (decode, ids)):
      exported = jax.export.export(
        jax.jit(functools.partial(over_images, function)),
        platforms=[platform],
        disabled_checks=_CHECKS,
      )(jax.ShapeDtypeStruct((batch, *one.shape), one.dtype))
      name = f'{function.__name__}_{platform}.stablehlo'
      (Path(folder) / name).write_bytes(exported.serialize())
