"""Step time with LPIPS and a discriminator: G, VGG16 and D apart.

python benchmarks/objective_parts.py [--size 64:16 128:16] [--repeats 5]
  [--predict]

The step of configs/photos_vqgan.py with MSE alone, with LPIPS, and with a
discriminator too, in turn in one process: medians; what a part adds is the
difference. `--predict` counts the operations of the step of
configs/imagenet_vqgan.py instead and says what they take on an H200, by
arithmetic: those of G by the formulas of docs/scale.md, those of VGG16 and D by
XLA, which counts programs without loops right. Assumed: 790 TFLOP/s in
bfloat16, 67 in float32 (the search).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from train_step import flops, our_step

from configs import photos_vqgan
from rvq_jax.models import lpips, lpips_weights
from rvq_jax.models.discriminator import Discriminator
from rvq_jax.paper import report as provenance
from rvq_jax.paper.ablation import cell_config

CELLS = ('mse', 'perceptual', 'adversarial')
TENSOR_CORES, FLOAT32 = 790e12, 67e12


def measure(side, batch, repeats):
  """Median seconds of a step of each of `CELLS`."""
  calls = {}
  for cell in CELLS:
    config = cell_config(photos_vqgan.get_config(), cell, 0)
    config.data.image_size, config.batch_size = side, batch
    calls[cell], _ = our_step(config)
    calls[cell]()
  times = {cell: [] for cell in CELLS}
  for _ in range(repeats):
    for cell, call in calls.items():
      start = time.perf_counter()
      call()
      times[cell].append(time.perf_counter() - start)
  return [statistics.median(times[cell]) for cell in CELLS]


def counted(function, *arguments) -> float:
  """Operations of a function, by XLA."""
  return jax.jit(function).lower(*arguments).cost_analysis()['flops']


def predict(side, batch):
  """Rows of part, TFLOP and the least ms on an H200."""
  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  weights = jax.eval_shape(lambda x: x, lpips_weights.load())
  judge = Discriminator()
  params = jax.eval_shape(judge.init, jax.random.key(0), images)

  def perceptual(weights, x, y):
    return jax.grad(lambda y: lpips.distance(weights, x, y).sum())(y)

  def adversarial(params, x, y):
    def of_y(y):
      return jax.nn.softplus(-judge.apply(params, y)).sum()

    def of_params(params):
      real, fake = judge.apply(params, x), judge.apply(params, y)
      return (jax.nn.softplus(-real) + jax.nn.softplus(fake)).sum()

    return jax.grad(of_y)(y), jax.grad(of_params)(params)

  search = 2 * batch * (side // 8) ** 2 * 16384 * 256
  return {
    'G': (flops(side, batch) - search, TENSOR_CORES),
    'search': (search, FLOAT32),
    'VGG16': (counted(perceptual, weights, images, images), TENSOR_CORES),
    'D': (counted(adversarial, params, images, images), TENSOR_CORES),
  }


def main():
  """Prints the measured or the predicted table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', nargs='+', default=['64:16', '128:16'])
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--predict', action='store_true')
  args = parser.parse_args()
  if args.predict:
    print('| part | TFLOP | ms |\n|---|---|---|')
    rows = predict(256, 128)
    for name, (count, speed) in rows.items():
      print(f'| {name} | {count / 1e12:.2f} | {1e3 * count / speed:.1f} |')
    total = sum(1e3 * count / speed for count, speed in rows.values())
    print(f'| all | | {total:.1f} |')
    return
  print(provenance.hardware())
  print('| size, batch | G, s | VGG16 | D | all | images/s |\n|' + '---|' * 6)
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
