"""The frozen latents of benchmarks/matched.py, and the order of its batches."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rvq_jax import VQVAE
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.loaders import eval_batches
from rvq_jax.metrics import to_float
from rvq_jax.models.decoder import Decoder
from rvq_jax.models.encoder import Encoder

DIM = 16


def batches(x, batch, steps, seed):
  """The batches of a seed: epoch after epoch, each in a new order."""
  rng = np.random.default_rng(seed)
  per_epoch = len(x) // batch
  for step in range(steps):
    i = step % per_epoch
    if i == 0:
      order = rng.permutation(len(x))
    yield x[order[i * batch : (i + 1) * batch]]


def load_images(source, count, size):
  """`count` images of a source, drawn at random; uint8 [n, size, size, 3]."""
  order = np.random.default_rng(0).permutation(len(source))[:count]
  batches = eval_batches(source.subset(order), batch_size=256, image_size=size)
  return np.concatenate([b['image'][b['mask']] for b in batches])


def autoencoder(images, steps, batch=64):
  """Trains the autoencoder; latents [n, D] of images [n, h, w, 3] uint8."""
  sizes = {'widths': (32, 64), 'factor': 4, 'num_res_blocks': 1}
  model = VQVAE(
    encoder=Encoder(code_dim=DIM, **sizes),
    decoder=Decoder(num_heads=4, **sizes),
  )
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
  state = model.init(jax.random.key(0), to_float(images[:2]), quantize=False)
  state = state['params'], state['batch_stats']

  @jax.jit
  def step(state, opt_state, x):
    def loss(params):
      out, updates = model.apply(
        {'params': params, 'batch_stats': state[1]},
        to_float(x),
        train=True,
        mutable=['batch_stats'],
        quantize=False,
      )
      error = jnp.mean((out.reconstruction - to_float(x)) ** 2)
      return error, updates['batch_stats']

    (error, stats), grads = jax.value_and_grad(loss, has_aux=True)(state[0])
    change, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(state[0], change), stats), opt_state, error

  opt_state = optimizer.init(state[0])
  for i, x in enumerate(batches(images, batch, steps, seed=0)):
    state, opt_state, error = step(state, opt_state, x)
    if (i + 1) % 250 == 0:
      print(f'autoencoder, step {i + 1}: mse {float(error):.4f}', flush=True)
  variables = {'params': state[0], 'batch_stats': state[1]}
  encode = jax.jit(lambda x: model.apply(variables, x, method='latents'))

  def latents(images):
    parts = [
      np.asarray(encode(to_float(images[i : i + 256]))).reshape(-1, DIM)
      for i in range(0, len(images), 256)
    ]
    return np.concatenate(parts)

  return latents


def load_latents(args):
  """Latents to train on and held-out ones, from the cache if it is there."""
  path = Path(args.workdir, 'latents.npz')
  asked = f'{args.data} {args.image_size} {args.autoencoder_steps}'
  if not path.exists():
    data = open_dataset(args.data, data_dir=args.data_dir)
    per_image = (args.image_size // 4) ** 2
    needed = -(-args.held_out // per_image)
    images = load_images(data.train, -(-(2**20) // per_image), args.image_size)
    held_out = load_images(data.validation, needed, args.image_size)
    latents = autoencoder(images, args.autoencoder_steps)
    z, held_out = latents(images), latents(held_out)
    mean, scale = z.mean(axis=0), z.std(axis=0)
    scale = np.sqrt(np.mean(scale**2))
    z, held_out = ((x - mean) / scale for x in (z, held_out))
    # In random order, so that any first rows come from all images.
    z = np.random.default_rng(1).permutation(z)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part.npz')
    np.savez(part, train=z, held_out=held_out, asked=asked)
    os.replace(part, path)
  cache = np.load(path, allow_pickle=False)
  if str(cache['asked']) != asked:
    sys.exit(
      f'error: {path} holds latents of {cache["asked"]}, expected {asked}; '
      'name another --workdir'
    )
  z, held_out = cache['train'], cache['held_out'][: args.held_out]
  if len(z) < args.rows or len(held_out) < args.held_out:
    sys.exit(
      f'error: expected {args.rows} latents to train on and {args.held_out} '
      f'held out, the images give {len(z)} and {len(held_out)}; lower --rows '
      'and --held_out'
    )
  return z, held_out
