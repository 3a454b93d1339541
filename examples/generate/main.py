"""Trains a small transformer on a folder of tokens and draws images with it.

python examples/generate/main.py --tokens=tokens --workdir=runs/generator
  [--tokenizer=runs/mine] [--num_steps=3000 ...]

`rvq encode` writes the tokens. The transformer generates one grid by masks,
multi-scale tokens scale by scale, per class if the tokens have labels. It holds
out tokens/validation, or a share. The same command resumes. WORKDIR has
samples.png and metrics.json. No dropout: for short runs.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from generators import Masked, NextScale, Transformer
from PIL import Image
from tqdm import tqdm

from rvq_jax import TokenDataset, load
from rvq_jax.evaluation import efficientnet
from rvq_jax.evaluation.perceptual import frechet_distance
from rvq_jax.io import check_folder, read_json, write_atomic
from rvq_jax.metrics import code_statistics, to_uint8
from rvq_jax.training.backend import prepare_backend

OPTIONS = {  # the first seven identify a run
  'num_steps': (3000, 'updates'),
  'batch_size': (0, 'images; 0: about 4096 tokens'),
  'width': (128, 'channels'),
  'depth': (6, 'blocks'),
  'learning_rate': (1e-3, "AdamW's highest"),
  'held_out': (0.1, 'share of the tokens, unless a folder validation exists'),
  'seed': (0, 'for parameters, order, masks and the held-out share'),
  'guidance': (1.5, 'towards the class; 1: none'),
  'sample_steps': (16, 'steps of masked generation'),
  'save_every': (500, 'updates'),
  'fd_images': (1000, 'images for the Frechet distance; 0: skip it'),
}
BATCH = 50  # images per batch outside training


def open_tokens(folder, tokenizer, seed: int, share: float):
  """The tokenizer; ids [N, T], labels [N]; held-out ones; an image's shape."""
  folders = [folder / name for name in ('train', 'validation')]
  folders = [x for x in folders if (x / 'meta.json').exists()] or [folder]
  datasets, parts = [*map(TokenDataset, folders)], []
  name = tokenizer or datasets[0].meta.get('source', {}).get('model')
  if not name:
    raise ValueError(f'{folder} does not name its model: add --tokenizer')
  tokenizer = load(name)
  for tokens in datasets:
    tokenizer.check_encoder(tokens.meta['encoder_hash'], folder)
    shape = tokens.ids.shape[1:]
    if tokenizer.codes_per_position:
      raise ValueError(f'{folder}: expected one id per position, got {shape}')
    ids = np.int32(tokens.ids[tokens.rows]).reshape(len(tokens), -1)
    parts.append((ids, tokens.labels[tokens.rows]))
  if len(parts) == 1:
    order = np.random.default_rng(seed).permutation(len(parts[0][0]))
    end = round(share * len(order))
    parts = [[x[rows] for x in parts[0]] for rows in (order[end:], order[:end])]
  if not all(len(ids) for ids, _ in parts):
    raise ValueError(f'{folder}: expected tokens to train on and to hold out')
  return tokenizer, *parts, shape


def train(generator, ids, labels, args):
  """Parameters after --num_steps; resumes from the last checkpoint."""
  warmup = min(200, args.num_steps // 10)
  schedule = 0.0, args.learning_rate, warmup, args.num_steps
  adam = optax.adamw(optax.warmup_cosine_decay_schedule(*schedule), b2=0.98)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
  key, seen = jax.random.key(args.seed), generator.inputs(ids[:1])
  params = jax.jit(generator.model.init)(key, seen, labels[:1])
  state = params, optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, ids, labels, step):
    hide, draw = jax.random.split(jax.random.fold_in(key, step))
    hidden = jax.random.bernoulli(hide, 0.1, labels.shape)  # for guidance
    labels = jnp.where(hidden, -1, labels)
    loss = lambda x: generator.nats(x, ids, labels, draw).mean()  # noqa: E731
    nats, gradient = jax.value_and_grad(loss)(state[0])
    updates, moments = optimizer.update(gradient, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), nats

  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  path = args.workdir.resolve() / 'checkpoints'
  with ocp.CheckpointManager(path, options=options) as checkpoints:
    if start := checkpoints.latest_step() or 0:
      state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
    bar = tqdm(range(start, args.num_steps), mininterval=1)
    for step in bar:
      epoch, batch = divmod(step, len(ids) // args.batch_size)
      order = np.random.default_rng([args.seed, epoch]).permutation(len(ids))
      rows = order[batch * args.batch_size :][: args.batch_size]
      state, nats = update(state, ids[rows], labels[rows], step)
      bar.set_postfix_str(f'{nats / np.log(2):.2f} bits per token', False)
      if (step + 1) % args.save_every == 0 or step + 1 == args.num_steps:
        checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
  return state[0]


def over_batches(function, *arrays) -> np.ndarray:
  """Joins function(key, batch of each array) over batches of one size."""
  count, results = len(arrays[0]), []
  for i in tqdm(range(0, count, BATCH), disable=None):
    batch = [x[np.arange(i, i + BATCH) % count] for x in arrays]
    results.append(np.asarray(function(jax.random.key(i), *batch)))
  return np.concatenate(results)[:count]


def likelihood(generator, params, trained, held_out) -> dict[str, float]:
  """Bits per held-out token: a bound for one grid, exact for scales.

  Also the cross-entropy under the training frequencies (plus 1), the upper
  limit for a useful model, and the entropy of the held-out frequencies.
  """
  nats, size = jax.jit(generator.nats), generator.model.codebook_size
  # A small set is repeated: each copy gets another mask.
  repeated = [np.concatenate([x] * -(-2000 // len(x))) for x in held_out]
  bits = over_batches(lambda key, *x: nats(params, *x, key), *repeated)
  bits /= np.log(2)
  counts, there = (
    np.bincount(ids.ravel(), minlength=size) for ids, _ in (trained, held_out)
  )
  cross = -np.log2((counts + 1) / (counts.sum() + size)) @ there / there.sum()
  return {
    'bits_per_token': float(bits.mean()),
    'cross_entropy_of_training_frequencies': float(cross),
    'entropy_of_held_out_frequencies': code_statistics(there)['entropy_bits'],
  }


def frechet(samples, real, trained) -> dict[str, float]:
  """Distances to `real`, reconstructions of as many held-out images."""
  try:
    weights, extract = efficientnet.load(), jax.jit(efficientnet.features)
  except ImportError as error:
    print(f'fd_efficientnet_lite0 left out: {error}')
    return {}
  of_batch = lambda _, x: extract(weights, np.float32(x / 127.5 - 1))  # noqa: E731
  real, *others = (over_batches(of_batch, x) for x in (real, samples, trained))
  names = 'fd_efficientnet_lite0', 'fd_efficientnet_lite0_of_training_images'
  distances = (frechet_distance(x, real) for x in others)
  return dict(zip(names, distances, strict=True))


def parse(argv):
  """The arguments, and tokenizer, parts of the tokens, shape of the ids."""
  about = (__doc__ or '').partition('\n')[0]
  parser = argparse.ArgumentParser(description=about)
  for name in ('tokens', 'workdir'):
    parser.add_argument(f'--{name}', required=True, type=Path)
  parser.add_argument('--tokenizer', help='run or export [as in --tokens]')
  for name, (value, text) in OPTIONS.items():
    options = {'type': type(value), 'default': value}
    parser.add_argument(f'--{name}', **options, help=f'{text} [{value}]')
  args = parser.parse_args(argv)
  if min(args.num_steps, args.width, args.sample_steps, args.save_every) < 1:
    raise ValueError('expected steps, --width and --save_every of at least 1')
  prepare_backend()
  tokenizer, *parts, shape = open_tokens(
    args.tokens, args.tokenizer, args.seed, args.held_out
  )
  count, length = parts[0][0].shape
  args.batch_size = min(args.batch_size or max(1, 4096 // length), count)
  settings = {name: getattr(args, name) for name in list(OPTIONS)[:7]}
  settings |= {'model_hash': tokenizer.model_hash, 'num_images': count}
  if not (path := args.workdir / 'config.json').exists():
    check_folder(args.workdir, '--workdir')
    args.workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings))
  if read_json(path) != settings:
    raise ValueError(f'{path} has other settings; name another --workdir')
  return args, tokenizer, parts, shape


def main(argv=None):
  """Trains, measures, draws."""
  try:
    args, tokenizer, parts, shape = parse(argv)
  except (ValueError, OSError, ImportError) as error:
    sys.exit('error: ' + ' '.join(str(error).split()))
  (ids, labels), (there, labels_there) = parts
  classes = 1 + int(max(labels.max(), labels_there.max()))
  sizes = tokenizer.codebook_size, ids.shape[1], classes, tokenizer.sides or ()
  model = Transformer(*sizes, args.width, args.depth)
  generator = Masked(model)
  if tokenizer.prefixes:
    unit = NextScale(model, tokenizer).inputs(ids[:256]).std()
    generator = NextScale(model, tokenizer, float(unit))
  params = train(generator, ids, labels, args)
  result = likelihood(generator, params, *parts)
  settings = args.guidance if classes else 1.0, args.sample_steps
  draw = jax.jit(functools.partial(generator.sample, *settings))

  def sample(labels):
    return over_batches(lambda key, x: draw(params, key, x), labels)

  def decode(ids):
    grids = ids.reshape(-1, *shape)
    return over_batches(lambda _, x: to_uint8(tokenizer.decode(x)), grids)

  rows = np.unique(np.linspace(0, classes - 1, 10, dtype=int))
  images = decode(sample(np.repeat(rows if classes else [-1] * 8, 8)))
  sheet = [np.hstack(images[i : i + 8]) for i in range(0, len(images), 8)]
  Image.fromarray(np.vstack(sheet)).save(args.workdir / 'samples.png')
  count = min(args.fd_images, len(there))
  if count > 1:
    drawn = sample(labels_there[:count]), there[:count], ids[:count]
    result |= frechet(*map(decode, drawn))
  write_atomic(args.workdir / 'metrics.json', json.dumps(result, indent=2))
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
