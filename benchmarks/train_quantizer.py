"""The same model, data order and seed with our quantizer and with the peer's.

  python benchmarks/train_quantizer.py --data_dir=DIR
    --quantizer=rvq_jax|vector-quantize-pytorch [--factor=8]
    [--codebook_size=8192] [--num_steps=328] [--batch_size=128]
    [--num_res_blocks=6] [--seed=0] [--config.FIELD=VALUE ...]
    [--rotation_trick=0|1] [--dead=2] [--workdir=DIR] [--output=FILE.jsonl]

Trains configs/cifar10.py on the official training split and prints MSE, usage
and perplexity of the test split as one line of JSON. `rvq_jax` is the ordinary
run of launch/main.py. `vector-quantize-pytorch` (`pip install torch
vector-quantize-pytorch`) takes the place of `VectorQuantizer` between our
encoder and decoder: k-means start, replacement of codes under an EMA count of
`--dead`, rotation trick or straight-through. Encoder, decoder, their initial
parameters, optimizer, schedule, steps before quantization, order of the images
and flips are bit-exact copies.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import time

CORES = 2
if hasattr(os, 'sched_setaffinity'):  # before JAX and torch count the cores
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from rvq_jax import metrics, sharding  # noqa: E402
from rvq_jax.data import loaders  # noqa: E402
from rvq_jax.data.images import prepare_images, random_flip  # noqa: E402
from rvq_jax.evaluation.evaluate import evaluate_run  # noqa: E402
from rvq_jax.training import build  # noqa: E402
from rvq_jax.training.config import check_config  # noqa: E402
from rvq_jax.training.loop import train  # noqa: E402
from rvq_jax.training.step import compile_init  # noqa: E402
from rvq_jax.training.validation import evaluate_split  # noqa: E402

PEER = 'vector-quantize-pytorch'
SHOWN = ('mse', 'psnr', 'usage', 'perplexity', 'bits_per_image')


def make_config(args):
  """configs/cifar10.py with the arguments of the command line."""
  path = ROOT / 'configs' / 'cifar10.py'
  spec = importlib.util.spec_from_file_location('cifar10', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(f'f{args.factor}')
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
    try:
      import torch
      from vector_quantize_pytorch import VectorQuantize
    except ImportError as error:
      sys.exit(f'--quantizer={PEER} needs both packages: {error}')
    torch.manual_seed(config['seed'])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    self.torch = torch
    self.layer = VectorQuantize(
      dim=config['model.code_dim'],
      codebook_size=config['model.codebook_size'],
      decay=config['model.decay'],
      commitment_weight=config['model.commitment_weight'],
      rotation_trick=rotation_trick,
      kmeans_init=True,
      threshold_ema_dead_code=dead,
    )

  def __call__(self, z, *, train):
    """Quantized z and ids as arrays, and dL/dz as a function of dL/dq."""
    shape = z.shape
    z = self.torch.tensor(np.asarray(z)).reshape(shape[0], -1, shape[-1])
    self.layer.train(train)
    if not train:
      with self.torch.no_grad():
        quantized, ids, _ = self.layer(z)
      return quantized.numpy().reshape(shape), ids.numpy(), None
    z.requires_grad_()
    quantized, ids, loss = self.layer(z)

    def backward(gradient):
      gradient = self.torch.tensor(np.asarray(gradient)).reshape(z.shape)
      (self.torch.sum(quantized * gradient) + loss.sum()).backward()
      return z.grad.numpy().reshape(shape)

    return quantized.detach().numpy().reshape(shape), ids.numpy(), backward


def halves(model):
  """Encoder and decoder of a VQVAE as jitted functions with their pullbacks."""

  def run(method):
    def apply(params, stats, x):
      return model.apply(
        {'params': params, 'batch_stats': stats},
        x,
        train=True,
        mutable=['batch_stats'],
        method=method,
      )

    return apply

  decoder = run(lambda model, q, train: model.decoder(q, train=train))

  @jax.jit
  def encode(params, stats, images):
    return jax.vjp(
      lambda p: run('latents')(p, stats, images), params, has_aux=True
    )

  @jax.jit
  def decode(params, stats, q, images):
    def loss(params, q):
      reconstruction, updates = decoder(params, stats, q)
      return jnp.mean((reconstruction - images) ** 2), updates

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, q)

  return encode, decode


def train_peer(config, **options):
  """Trains with the peer's quantizer; returns the metrics of the test split."""
  config, mesh = check_config(config), sharding.data_mesh()
  dataset, loader = build.build_data(config)
  step = build.build_step(config, config['num_steps'])
  model, optimizer = step.model, step.optimizer
  quantizer = PeerQuantizer(config, **options)
  sizes = config['data.image_size'], config['batch_size']
  state = compile_init(step, mesh, *sizes)(jax.random.key(config['seed']))
  params, stats, opt_state = state.params, state.batch_stats, state.opt_state
  encode, decode = halves(model)

  @jax.jit
  def prepare(step, images):
    key = jax.random.fold_in(jax.random.key(config['seed']), step)
    return random_flip(jax.random.split(key)[0], prepare_images(images))

  @jax.jit
  def update(params, opt_state, step, pullback, dz, from_decoder):
    grads = jax.tree.map(jnp.add, pullback(dz)[0], from_decoder)
    steps, opt_state = optimizer.update(grads, opt_state, params, step=step)
    return optax.apply_updates(params, steps), opt_state

  start = time.time()
  for step in range(config['num_steps']):
    images = prepare(step, next(loader)['image'])
    z, pullback, encoded = encode(params, stats, images)
    if step > config['model.quantize_after']:
      q, ids, backward = quantizer(z, train=True)
    else:
      q, ids, backward = z, np.zeros(0), lambda gradient: gradient
    (error, decoded), (grads, dq) = decode(params, stats, q, images)
    stats = {
      'encoder': encoded['batch_stats']['encoder'],
      'decoder': decoded['batch_stats']['decoder'],
    }
    params, opt_state = update(
      params, opt_state, step, pullback, backward(dq), grads
    )
    if (step + 1) % 25 == 0:
      print(
        f'step {step + 1}  mse {float(error):.4f}  codes in the batch '
        f'{len(np.unique(ids))} of {ids.size} tokens  '
        f'{(time.time() - start) / (step + 1):.2f} s/step',
        flush=True,
      )
  loader.close()
  batches = loaders.eval_batches(
    dataset.test,
    batch_size=config['batch_size'],
    image_size=config['data.image_size'],
  )
  variables = {'params': params, 'batch_stats': stats}
  step = make_peer_eval_step(model, quantizer, config['model.codebook_size'])
  return evaluate_split(step, variables, batches, mesh=mesh)[0]


def make_peer_eval_step(model, quantizer, codebook_size):
  """What `make_eval_step` returns, for a model with the peer's quantizer."""
  encode = jax.jit(
    lambda variables, x: model.apply(variables, x, method='latents')
  )

  @jax.jit
  def decode(variables, q, images, mask):
    out = model.apply(variables, q, method=lambda model, q: model.decoder(q))
    return {
      name: jnp.sum(jnp.where(mask, measure(out, images), 0))
      for name, measure in (
        ('mse', metrics.squared_error),
        ('psnr', metrics.psnr),
        ('ssim', metrics.ssim),
      )
    }

  def eval_step(variables, batch):
    images, mask = prepare_images(batch['image']), np.asarray(batch['mask'])
    z = encode(variables, images)
    q, ids, _ = quantizer(z, train=False)
    ids = ids.reshape(len(mask), -1)[mask]
    latents, codes = (
      np.asarray(x, np.float64)[mask].reshape(-1, q.shape[-1]) for x in (z, q)
    )
    error = np.sum((latents - codes) ** 2)
    return decode(variables, q, images, mask) | {
      'images': mask.sum(),
      'tokens': ids.size,
      'positions': len(latents),
      'quantization_error': error / q.shape[-1],
      'latent_error': error,
      'latents': {'sum': latents.sum(axis=0), 'outer': latents.T @ latents},
      'codes': {'sum': codes.sum(axis=0), 'outer': codes.T @ codes},
      'counts': np.bincount(ids.reshape(-1), minlength=codebook_size),
    }

  return eval_step


def main():
  """Parses the command line, trains, evaluates and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--workdir', default='runs/train_quantizer')
  parser.add_argument(
    '--quantizer', choices=('rvq_jax', PEER), default='rvq_jax'
  )
  for name, value in {
    'factor': 8,
    'codebook_size': 8192,
    'num_steps': 328,
    'batch_size': 128,
    'num_res_blocks': 6,
    'seed': 0,
    'rotation_trick': 1,
    'dead': 2.0,
  }.items():
    parser.add_argument(f'--{name}', type=type(value), default=value)
  parser.add_argument('--output', help='the line is appended to it')
  args, rest = parser.parse_known_args()
  args.fields = {}
  for flag in rest:
    name, _, value = flag.partition('=')
    if not name.startswith('--config.'):
      parser.error(f'expected --config.FIELD=VALUE, got {flag}')
    with contextlib.suppress(json.JSONDecodeError):  # text stays text
      value = json.loads(value)
    args.fields[name.removeprefix('--config.')] = value
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
  line = json.dumps(vars(args) | {n: result[n] for n in SHOWN} | minutes)
  print(line)
  if args.output:
    with open(args.output, 'a') as stream:
      stream.write(line + '\n')


if __name__ == '__main__':
  main()
