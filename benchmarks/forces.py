"""What pushes the norms of the latents up and down, in a trained run.

  python benchmarks/forces.py --workdir=RUN [--workdir=RUN ...]
    [--data=folder:DIR]

With g = dL/dq of the reconstruction loss L and `to_e` the gradient dL/de of an
estimator, a gradient step on e changes |e|^2/2 by -e.to_e, and commitment by
-2 beta e.(e - q)/D per vector (docs/gradients.md). Printed are means over the
validation images of the run (or of --data), times 1e6 and per |e|^2/2:
positive grows. All estimators see the same state. Also the loss with e instead
of q, and the first-order estimate of that gain, -g.(e - q).
"""

import common
import jax
import jax.numpy as jnp
from tried import ESTIMATORS

from rvq_jax import load
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.loaders import eval_batches
from rvq_jax.metrics import to_float

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
    decoded = apply(q.reshape(z.shape), lambda m, q: m.decoder(q))
    return jnp.mean((decoded - images) ** 2)

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
  sums = [
    step(tokenizer.variables, to_float(batch['image']))
    for batch in eval_batches(source.validation, batch_size=32, image_size=size)
    if batch['mask'].all()
  ]
  return {k: sum(float(x[k]) for x in sums) / len(sums) for k in sums[0]}


def main():
  """Prints one table."""
  parser = common.parser(__doc__, data=None)
  parser.add_argument('--workdir', action='append', required=True)
  args = parser.parse_args()
  columns = {w: measure(w, args.data) for w in args.workdir}
  print(common.header('', *columns))
  for name in next(iter(columns.values())):
    print(common.row(name, *(f'{x[name]:.4g}' for x in columns.values())))


if __name__ == '__main__':
  main()
