"""Step time with LPIPS and a discriminator: G, VGG16 and D apart.

python benchmarks/objective_parts.py [--size 64:16 128:16] [--repeats 5]
  [--predict]

The step of configs/photos_vqgan.py with only MSE, with LPIPS, and with a
discriminator too, in turn in one process: medians; a part adds the difference.
`--predict` instead counts the operations of the step of imagenet_vqgan and
computes their least time on an H200: G by the formulas of docs/predictions.md,
VGG16 and D by XLA, which counts programs without loops right. Assumed: 790
TFLOP/s in bfloat16, 67 in float32 (the search).
"""

import statistics

import common
import jax
import jax.numpy as jnp
from train_step import our_step

from rvq_jax.models import lpips, lpips_weights
from rvq_jax.models.discriminator import Discriminator
from rvq_jax.paper.ablation import cell_config

CELLS = ('mse', 'perceptual', 'adversarial')


def measure(side, batch, repeats):
  """Median seconds of a step of each of `CELLS`."""
  calls = {}
  for cell in CELLS:
    config = cell_config(common.load_config('photos_vqgan'), cell, 0)
    config.data.image_size, config.batch_size = side, batch
    calls[cell], _ = our_step(config)
  times = common.measure(calls, repeats)
  return [statistics.median(times[cell]) / 1e3 for cell in CELLS]


def counted(function, *arguments) -> float:
  """Operations of a function, by XLA."""
  return jax.jit(function).lower(*arguments).cost_analysis()['flops']


def predict(side, batch):
  """Rows of part, TFLOP and the least ms on an H200."""
  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  weights = jax.eval_shape(lambda x: x, lpips_weights.load())
  discriminator = Discriminator()
  params = jax.eval_shape(discriminator.init, jax.random.key(0), images)

  def perceptual(weights, x, y):
    return jax.grad(lambda y: lpips.distance(weights, x, y).sum())(y)

  def adversarial(params, x, y):
    def of_y(y):
      return jax.nn.softplus(-discriminator.apply(params, y)).sum()

    def of_params(params):
      real, fake = (discriminator.apply(params, z) for z in (x, y))
      return (jax.nn.softplus(-real) + jax.nn.softplus(fake)).sum()

    return jax.grad(of_y)(y), jax.grad(of_params)(params)

  config, half = common.load_config('imagenet'), common.TENSOR_CORES
  config.data.image_size, config.batch_size = side, batch
  model, search = common.flops(config)
  return {
    'G': (model, half),
    'search': (search, common.FLOAT32),
    'VGG16': (counted(perceptual, weights, images, images), half),
    'D': (counted(adversarial, params, images, images), half),
  }


def main():
  """Prints the measured or the predicted table."""
  args = common.parser(
    __doc__, size=['64:16', '128:16'], repeats=5, predict=False
  ).parse_args()
  if args.predict:
    print(common.header('part', 'TFLOP', 'ms'))
    rows = predict(256, 128)
    for name, (count, speed) in rows.items():
      print(f'| {name} | {count / 1e12:.2f} | {1e3 * count / speed:.1f} |')
    total = sum(1e3 * count / speed for count, speed in rows.values())
    print(f'| all | | {total:.1f} |')
    return
  print(common.hardware())
  columns = 'G, s', 'VGG16', 'D', 'all', 'images/s'
  print(common.header('size, batch', *columns))
  for size in args.size:
    side, batch = map(int, size.split(':'))
    g, with_vgg, whole = measure(side, batch, args.repeats)
    print(
      f'| {side}x{side}, {batch} | {g:.2f} | {with_vgg - g:.2f} '
      f'| {whole - with_vgg:.2f} | {whole:.2f} | {batch / whole:.1f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
