"""What pushes the norms of the latents up and down, in a trained run.

  python benchmarks/forces.py --workdir=RUN [--workdir=RUN ...]
    [--data=folder:DIR]

With g = dL/dq of the reconstruction loss L and `to_e` what an estimator makes
of it, a gradient step on e changes |e|^2/2 by -e.to_e, and commitment by
-2 beta e.(e - q)/D per vector (docs/gradients.md). Printed are means over
validation images of the run, times 1e6 and per |e|^2/2: positive grows.
Every estimator is looked at in the same state. Also the loss with e in the
place of q, and the first-order estimate of what that gains, -g.(e - q).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'launch'), str(ROOT / 'benchmarks')]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from tried import ESTIMATORS  # noqa: E402

from rvq_jax import load  # noqa: E402
from rvq_jax.data.datasets import open_dataset  # noqa: E402
from rvq_jax.data.images import to_float  # noqa: E402
from rvq_jax.data.loaders import eval_batches  # noqa: E402

NAMES = ('ste', 'rotation', 'rotation_unscaled', 'radial', 'tangential')


def forces(model, variables, images, beta):
  """Sums over a batch: growth by each estimator and by commitment."""

  def apply(x, method):
    return model.apply(variables, x, method=method)

  z = apply(images, 'latents')
  e = z.reshape(-1, z.shape[-1])
  ids = apply(images, 'encode')
  q = apply(ids, lambda m, ids: m.vq.codes_from_ids(ids)).reshape(e.shape)

  def loss(q):
    made = apply(q.reshape(z.shape), lambda m, q: m.decoder(q))
    return jnp.mean((made - images) ** 2)

  quantized, g = jax.value_and_grad(loss)(q)
  energy = jnp.sum(e**2)
  sums = {'mse': quantized, 'mse of e': loss(e)}
  sums['-g.(e - q)'] = -jnp.sum(g * (e - q))
  for name in NAMES:
    to_e = jax.grad(
      lambda e, name=name: jnp.sum(g * ESTIMATORS[name](e, q, max_scale=10.0))
    )(e)
    sums[name] = -2e6 * jnp.sum(e * to_e) / energy
  sums['commitment'] = -4e6 * beta * jnp.sum(e * (e - q)) / e.size / energy
  return sums


def measure(workdir, data) -> dict:
  """Means of `forces` over the validation images of a run."""
  tokenizer = load(workdir)
  config = tokenizer.config
  source = open_dataset(data or config['data.name'], split='official')
  step = jax.jit(
    lambda variables, images: forces(
      tokenizer.model, variables, images, config['model.commitment_weight']
    )
  )
  size = config['data.image_size']
  found = [
    step(tokenizer.variables, to_float(batch['image']))
    for batch in eval_batches(source.validation, batch_size=32, image_size=size)
    if batch['mask'].all()
  ]
  return {k: sum(float(x[k]) for x in found) / len(found) for k in found[0]}


def main():
  """Prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', action='append', required=True)
  parser.add_argument('--data', help="instead of the run's: folder:DIR")
  args = parser.parse_args()
  columns = {w: measure(w, args.data) for w in args.workdir}
  print('| |', ' | '.join(columns), '|')
  print('|---|' + '---|' * len(columns))
  for name in next(iter(columns.values())):
    values = (f'{column[name]:.4g}' for column in columns.values())
    print(f'| {name} |', ' | '.join(values), '|')


if __name__ == '__main__':
  main()
