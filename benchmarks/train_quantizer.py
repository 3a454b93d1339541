"""The same model, data order and seed with our quantizer and with the peer's.

  python benchmarks/train_quantizer.py --data_dir=DIR
    --quantizer=rvq_jax|vector-quantize-pytorch [--factor=8]
    [--codebook_size=8192] [--num_steps=328] [--batch_size=128]
    [--num_res_blocks=6] [--seed=0] [--config.FIELD=VALUE ...]
    [--rotation_trick=0|1] [--dead=2] [--workdir=DIR] [--output=FILE.jsonl]

Trains configs/cifar10.py on the official training split and prints MSE, usage
and perplexity of the test split as one line of JSON. `rvq_jax` is the ordinary
run of launch/main.py. `vector-quantize-pytorch` (`pip install torch
vector-quantize-pytorch`) replaces `VectorQuantizer` between our encoder and
decoder: k-means start, replacement of codes under an EMA count of `--dead`,
rotation trick or straight-through. Encoder, decoder, their initial parameters,
optimizer, schedule, steps before quantization, order of the images and flips
are bit-exact copies. Its codes are evaluated in our `VectorQuantizer`.
"""

import contextlib
import json
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rvq_jax import sharding
from rvq_jax.data import datasets, loaders
from rvq_jax.data.images import random_flip
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.metrics import prepare_images
from rvq_jax.training.loop import train
from rvq_jax.training.step import compile_init
from rvq_jax.training.validation import evaluate_split, make_eval_step

PEER = 'vector-quantize-pytorch'
SHOWN = ('mse', 'psnr', 'usage', 'perplexity', 'bits_per_image')


def make_config(args):
  """configs/cifar10.py with the arguments of the command line."""
  config = common.load_config('cifar10', f'f{args.factor}')
  config.seed, config.batch_size = args.seed, args.batch_size
  config.num_steps, config.eval_every = args.num_steps, 0
  config.data.data_dir, config.data.split = args.data_dir, 'official'
  config.model.codebook_size = args.codebook_size
  config.model.num_res_blocks = args.num_res_blocks
  config.update_from_flattened_dict(args.fields)
  return config


class PeerQuantizer:
  """vector-quantize-pytorch between two halves of a JAX model."""

  def __init__(self, config, *, rotation_trick, dead):
    self.torch, self.layer = common.make_peer(
      config['model.code_dim'],
      config['model.codebook_size'],
      seed=config['seed'],
      decay=config['model.decay'],
      commitment_weight=config['model.commitment_weight'],
      rotation_trick=rotation_trick,
      kmeans_init=True,
      threshold_ema_dead_code=dead,
    )

  def __call__(self, z):
    """Quantized z and ids as arrays, and dL/dz as a function of dL/dq."""
    shape = z.shape
    z = self.torch.tensor(np.asarray(z)).reshape(shape[0], -1, shape[-1])
    z.requires_grad_()
    quantized, ids, loss = self.layer.train()(z)

    def backward(gradient):
      gradient = self.torch.tensor(np.asarray(gradient)).reshape(z.shape)
      (self.torch.sum(quantized * gradient) + loss.sum()).backward()
      return z.grad.numpy().reshape(shape)

    return quantized.detach().numpy().reshape(shape), ids.numpy(), backward

  def codes(self):
    """The codebook [K, D]."""
    return self.layer.codebook.detach().numpy()


def halves(model):
  """Encoder and decoder of a VQVAE as jitted functions with their pullbacks."""

  def run(params, stats, x, method):
    variables = {'params': params, 'batch_stats': stats}
    return model.apply(
      variables, x, train=True, mutable=['batch_stats'], method=method
    )

  @jax.jit
  def encode(params, stats, images):
    return jax.vjp(
      lambda p: run(p, stats, images, 'latents'), params, has_aux=True
    )

  @jax.jit
  def decode(params, stats, q, images):
    def loss(params, q):
      reconstruction, updates = run(
        params, stats, q, lambda model, q, train: model.decoder(q, train=train)
      )
      return jnp.mean((reconstruction - images) ** 2), updates

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, q)

  return encode, decode


def train_peer(config, **options):
  """Trains with the peer's quantizer; returns the metrics of the test split."""
  config, train_step = common.make_step(config)
  model, optimizer = train_step.model, train_step.optimizer
  quantizer = PeerQuantizer(config, **options)
  data = datasets.open_dataset(
    config['data.name'],
    split=config['data.split'],
    data_dir=config['data.data_dir'],
  )
  batch, size = config['batch_size'], config['data.image_size']
  sizes = {'batch_size': batch, 'image_size': size}
  loader = loaders.make_train_loader(data.train, seed=config['seed'], **sizes)
  mesh = sharding.data_mesh()
  first = compile_init(train_step, mesh, size, batch)
  state = first(jax.random.key(config['seed']))
  params, stats, opt_state = state.params, state.batch_stats, state.opt_state
  encode, decode = halves(model)

  @jax.jit
  def prepare(step, images):
    key = jax.random.fold_in(jax.random.key(config['seed']), step)
    return random_flip(jax.random.split(key)[0], prepare_images(images))

  @jax.jit
  def update(step, params, opt_state, pullback, dz, from_decoder):
    grads = jax.tree.map(jnp.add, pullback(dz)[0], from_decoder)
    change, opt_state = optimizer.update(grads, opt_state, params, step=step)
    return optax.apply_updates(params, change), opt_state

  start = time.time()
  for step in range(config['num_steps']):
    images = prepare(step, next(loader)['image'])
    z, pullback, encoded = encode(params, stats, images)
    if step >= config['model.quantize_after']:
      q, ids, backward = quantizer(z)
    else:
      q, ids, backward = z, np.zeros(0), lambda gradient: gradient
    (error, decoded), (grads, dq) = decode(params, stats, q, images)
    stats = {  # none with GroupNorm
      name: part.get('batch_stats', {}).get(name, {})
      for name, part in (('encoder', encoded), ('decoder', decoded))
    }
    params, opt_state = update(
      step, params, opt_state, pullback, backward(dq), grads
    )
    if (step + 1) % 25 == 0:
      print(
        f'step {step + 1}  mse {float(error):.4f}  codes in the batch '
        f'{len(np.unique(ids))} of {ids.size} tokens  '
        f'{(time.time() - start) / (step + 1):.2f} s/step',
        flush=True,
      )
  loader.close()
  book = state.codebook['vq'] | {'embedding': quantizer.codes()}
  return evaluate_split(
    jax.jit(make_eval_step(model)),
    {'params': params, 'batch_stats': stats, 'codebook': {'vq': book}},
    loaders.eval_batches(data.test, **sizes),
    mesh=mesh,
  )[0]


def main():
  """Parses the command line, trains, evaluates and prints."""
  parser = common.parser(
    __doc__,
    data_dir=str,
    workdir='runs/train_quantizer',
    quantizer=('rvq_jax', PEER),
    factor=8,
    codebook_size=8192,
    num_steps=328,
    batch_size=128,
    num_res_blocks=6,
    seed=0,
    rotation_trick=1,
    dead=2.0,
    output=None,
  )
  args, rest = parser.parse_known_args()
  args.fields = {}
  for flag in rest:
    name, _, value = flag.partition('=')
    if not name.startswith('--config.'):
      parser.error(f'expected --config.FIELD=VALUE, got {flag}')
    with contextlib.suppress(json.JSONDecodeError):  # text stays text
      value = json.loads(value)
    args.fields[name.removeprefix('--config.')] = value
  common.use_cores()
  config = make_config(args)
  start = time.time()
  if args.quantizer == PEER:
    result = train_peer(
      config, rotation_trick=bool(args.rotation_trick), dead=args.dead
    )
  else:
    train(config, args.workdir)
    result = evaluate_run(args.workdir)
  minutes = {'minutes': round((time.time() - start) / 60, 1)}
  record = vars(args) | {n: result[n] for n in SHOWN} | minutes
  common.append_record(args.output, record)


if __name__ == '__main__':
  main()
