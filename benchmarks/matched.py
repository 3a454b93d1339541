"""The referee: which quantizer leaves the least error on the same latents.

  python benchmarks/matched.py --data=folder:DIR|tfds:NAME [--data_dir=DIR]
    [--cells=NAME,NAME] [--seeds=3] [--full] [--workdir=DIR]
    --output=benchmarks/matched.jsonl [--figure=FILE.png]
  python benchmarks/matched.py --table --output=FILE [--figure=FILE.png]

A small autoencoder without a quantizer is trained on the images and frozen. Its
latents [N, 16], moved to mean 0 and scaled to variance 1 as a whole, are what
every quantizer sees: the same batches in the same order per seed, and nothing
but its own loss. Held out are latents of other images. `lloyd` is 100
iterations of k-means over all training latents from K of them, `random` its
start; all else is measured in dB above `lloyd`.

A cell is a name of `registry.QUANTIZERS`, or `peer:CLASS` of
vector-quantize-pytorch (`pip install torch==2.13.0 vector-quantize-pytorch`;
left out without it), then '+argument=value' for what differs from the defaults.
`residual` and `product` spend the same bits on two codes of sqrt(K). Adam has
one learning rate for all, which falls to 0 by a cosine. A finished cell is a
line of the output; the same command resumes.

Hardware: CPU; the default grid takes under half an hour on two cores. `--full`
adds K = 16384 with a million latents and takes about a day.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'launch')]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from matched_peers import PREFIX, Peer  # noqa: E402
from recipe import processor, read  # noqa: E402

from rvq_jax import VQVAE, metrics, nearest_codes  # noqa: E402
from rvq_jax.data.datasets import open_dataset  # noqa: E402
from rvq_jax.data.images import to_float  # noqa: E402
from rvq_jax.data.loaders import eval_batches  # noqa: E402
from rvq_jax.quantize.registry import make_quantizer  # noqa: E402

DIM = 16
LLOYD_ITERATIONS = 100
CELLS = (
  *('random', 'lloyd', 'vq', 'vq+split_by=distortion'),
  *('vq+dead_code_threshold=0.1', 'vq+ema=false', 'residual', 'product'),
  *('simvq', 'fsq', 'peer:VectorQuantize', 'peer:VectorQuantize+dead=0.1'),
  *('peer:VectorQuantize+directional_reparam=true', 'peer:SimVQ'),
  *('peer:FSQ', 'peer:LFQ'),
)
KEY = ('data', 'cell', 'K', 'seed', 'rows', 'batch', 'steps', 'learning_rate')


def load_images(source, count, size):
  """`count` images of a source, drawn at random; uint8 [n, size, size, 3]."""
  order = np.random.default_rng(0).permutation(len(source))[:count]
  batches = eval_batches(source.subset(order), batch_size=256, image_size=size)
  return np.concatenate([b['image'][b['mask']] for b in batches])


def autoencoder(images, steps, batch=64):
  """Trains the autoencoder; latents [n, D] of images [n, h, w, 3] uint8."""
  model = VQVAE(
    widths=(32, 64),
    factor=4,
    num_res_blocks=1,
    num_heads=4,
    code_dim=DIM,
    quantizer={'codebook_size': 2},
  )
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
  state = model.init(
    jax.random.key(0), to_float(images[:2]), method='autoencode'
  )
  state = state['params'], state['batch_stats']

  @jax.jit
  def step(state, opt_state, x):
    def loss(params):
      out, updates = model.apply(
        {'params': params, 'batch_stats': state[1]},
        to_float(x),
        train=True,
        mutable=['batch_stats'],
        method='autoencode',
      )
      return jnp.mean((out - to_float(x)) ** 2), updates['batch_stats']

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
  found = np.load(path)
  if str(found['asked']) != asked:
    sys.exit(
      f'error: {path} holds latents of {found["asked"]}, expected {asked}; '
      'name another --workdir'
    )
  z, held_out = found['train'], found['held_out'][: args.held_out]
  if len(z) < args.rows or len(held_out) < args.held_out:
    sys.exit(
      f'error: expected {args.rows} latents to train on and {args.held_out} '
      f'held out, the images give {len(z)} and {len(held_out)}; lower --rows '
      'and --held_out'
    )
  return z, held_out


def batches(x, batch, steps, seed):
  """The batches of a seed: epoch after epoch, each in a new order."""
  rng = np.random.default_rng(seed)
  per_epoch = len(x) // batch
  for step in range(steps):
    i = step % per_epoch
    if i == 0:
      order = rng.permutation(len(x))
    yield x[order[i * batch : (i + 1) * batch]]


class Lloyd:
  """K-means over all rows from K of them; 0 iterations: those themselves."""

  trained_by = 'k-means'

  def __init__(self, k, seed, iterations):
    self.rng, self.k, self.iterations = (
      np.random.default_rng(seed),
      k,
      iterations,
    )
    self.bits = math.log2(k)

  def train(self, z, batches):
    """Runs the iterations; the error must never rise."""
    del batches
    z, last = z.astype(np.float32), math.inf
    self.codes = z[self.rng.choice(len(z), self.k, replace=False)]
    for _ in range(self.iterations):
      ids = np.asarray(nearest_codes(z, self.codes))
      error = np.sum((z - self.codes[ids]) ** 2, axis=1, dtype=np.float64)
      assert error.sum() <= last * (1 + 1e-6), (error.sum(), last)
      last = error.sum()
      counts = np.bincount(ids, minlength=self.k)
      sums = [np.bincount(ids, weights=x, minlength=self.k) for x in z.T]
      codes = np.stack(sums, axis=1) / np.maximum(counts, 1)[:, None]
      empty = np.flatnonzero(counts == 0)
      codes[empty] = z[
        self.rng.choice(len(z), len(empty), replace=False, p=error / last)
      ]
      self.codes = codes.astype(np.float32)

  def forward(self, x):
    """Quantized vectors and ids of x."""
    ids = np.asarray(nearest_codes(x, self.codes))
    return self.codes[ids], ids

  def decode(self, ids):
    """The vectors that ids stand for."""
    return self.codes[ids]

  def searches(self, x, ids):
    """(vectors, codes, ids) of each codebook search."""
    return [(x, self.codes, ids)]


class Ours:
  """A quantizer of rvq_jax."""

  def __init__(self, name, options, k, seed, batch, steps, learning_rate):
    del batch
    self.name, self.seed = name, seed
    self.codes = 2 if name in ('residual', 'product') else 1
    self.k = math.isqrt(k) if self.codes == 2 else k
    options |= {'residual': {'depth': 2}, 'product': {'heads': 2}}.get(name, {})
    self.layer = make_quantizer(name, codebook_size=self.k, **options)
    self.bits = self.codes * math.log2(self.k)
    self.on_mse = name == 'fsq'
    ema = getattr(self.layer, 'ema', False)
    self.trained_by = (
      'latent MSE, Adam' if self.on_mse else 'EMA' if ema else 'own loss, Adam'
    )
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    self.optimizer = optax.adam(schedule)

  def train(self, z, batches):
    """One step per batch."""
    key = jax.random.key(self.seed)
    variables = jax.jit(self.layer.init)(key, z[:2048])
    params = variables.pop('params', {})
    state = params, variables, self.optimizer.init(params)
    step = jax.jit(self._step, donate_argnums=0)
    for i, rows in enumerate(batches):
      state = step(state, rows, jax.random.fold_in(key, i))
    self.variables = jax.block_until_ready({'params': state[0], **state[1]})
    self.apply = jax.jit(self.layer.apply, static_argnames='method')

  def _step(self, state, z, key):
    params, rest, opt_state = state

    def loss(params):
      out, updates = self.layer.apply(
        {'params': params, **rest},
        z,
        train=True,
        mutable=['codebook'],
        rngs={'codebook': key},
      )
      mse = jnp.mean((out.quantized - z) ** 2) if self.on_mse else 0.0
      return out.loss + mse, updates

    grads, updates = jax.grad(loss, has_aux=True)(params)
    change, opt_state = self.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, change), {**rest, **updates}, opt_state

  def forward(self, x):
    """Quantized vectors and ids of x, in evaluation."""
    out = self.apply(self.variables, x)
    return np.asarray(out.quantized), np.asarray(out.ids)

  def decode(self, ids):
    """The vectors that ids stand for."""
    return np.asarray(self.apply(self.variables, ids, method='codes_from_ids'))

  def searches(self, x, ids):
    """(vectors, codes, ids) of each codebook search."""
    book = self.variables.get('codebook', {})
    if self.name == 'product':
      pieces = np.split(x, self.codes, axis=1)
      books = [book[f'head_{i}']['embedding'] for i in range(self.codes)]
      return [
        (*s, ids[:, i]) for i, s in enumerate(zip(pieces, books, strict=True))
      ]
    if self.name == 'residual':
      books = [np.asarray(book[f'level_{i}']['embedding']) for i in range(2)]
      left = x - books[0][ids[:, 0]]
      return [(x, books[0], ids[:, 0]), (left, books[1], ids[:, 1])]
    if self.name == 'fsq':
      return []
    return [(x, self.decode(np.arange(self.k)), ids)]


def wrong_ids(x, codes, ids, block=4096):
  """How many ids are not those of a nearest code, in float64."""
  codes, wrong = np.asarray(codes, np.float64), 0
  half = 0.5 * np.sum(codes**2, axis=1)
  for start in range(0, len(x), block):
    e, chosen = x[start : start + block].astype(np.float64), ids[start:][:block]
    best = np.argmax(e @ codes.T - half, axis=1)
    other = np.flatnonzero(best != chosen)
    distance = [
      np.sum((e[other] - codes[i[other]]) ** 2, axis=1) for i in (chosen, best)
    ]
    wrong += int(np.sum(distance[0] > distance[1]))
  return wrong


def make_quantizer_of(cell, k, seed, args):
  """The quantizer of a cell, as 'vq+decay=0.999'."""
  name, *parts = cell.split('+')
  options = {}
  for part in parts:
    field, _, value = part.partition('=')
    plain = value.replace('.', '').isdigit() or value in ('true', 'false')
    options[field] = json.loads(value) if plain else value
  if name in ('random', 'lloyd'):
    return Lloyd(k, seed, LLOYD_ITERATIONS if name == 'lloyd' else 0)
  cls = Peer if name.startswith(PREFIX) else Ours
  return cls(name, options, k, seed, args.batch, args.steps, args.learning_rate)


def measure(key, z, held_out, args):
  """One cell: trains it and returns its record."""
  quantizer = make_quantizer_of(key['cell'], key['K'], key['seed'], args)
  order = batches(z, args.batch, args.steps, key['seed'])
  start, cpu = time.perf_counter(), time.process_time()
  quantizer.train(z, order)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  forward, ids = quantizer.forward(held_out)
  decoded = quantizer.decode(ids)
  mse, seen = (
    np.mean((held_out - q).astype(np.float64) ** 2) for q in (decoded, forward)
  )
  columns = ids.reshape(len(ids), -1).T
  size = round(2 ** (quantizer.bits / len(columns)))
  counts = np.stack([np.bincount(c, minlength=size) for c in columns])
  x = np.concatenate([held_out, z])[:1_000_000]
  searches = quantizer.searches(x, quantizer.forward(x)[1])
  return key | {
    'trained_by': quantizer.trained_by,
    'bits': quantizer.bits,
    'mse': float(mse),
    'leak_db': 10 * math.log10(mse / seen),
    'leak_exact': bool(np.array_equal(decoded, forward)),
    'usage': metrics.code_statistics(counts)['usage'],
    'dimension': metrics.effective_dimension(
      decoded.sum(axis=0, dtype=np.float64), decoded.T @ decoded, len(decoded)
    ),
    'wrong_ids': sum(wrong_ids(*s) for s in searches) if searches else None,
    'checked_ids': len(x) * len(searches),
    'seconds': round(seconds, 1),
    'cpu_seconds': round(cpu, 1),
    'hardware': f'{os.cpu_count()} cores, {processor()}',
  }


def summaries(records):
  """(K, rows, cell) -> {name: (mean, sample std)} with `db` above Lloyd."""
  groups = {}
  for record in records:
    where = (record['K'], record['rows'], record['cell'])
    groups.setdefault(where, []).append(record)
  names = ('bits', 'mse', 'usage', 'dimension', 'seconds', 'leak_db')
  result = {}
  for (k, rows, cell), runs in groups.items():
    lloyd = groups.get((k, rows, 'lloyd'))
    columns = {name: [run[name] for run in runs] for name in names}
    if lloyd:
      reference = statistics.mean(run['mse'] for run in lloyd)
      columns['db'] = [10 * math.log10(e / reference) for e in columns['mse']]
    result[k, rows, cell] = {
      name: (
        statistics.mean(values),
        statistics.stdev(values) if len(values) > 1 else 0.0,
      )
      for name, values in columns.items()
    } | {'runs': runs}
  for (k, rows, cell), entry in result.items():
    lloyd = result.get((k, rows, 'lloyd'))
    if cell == 'random' and lloyd and lloyd['mse'][0] >= entry['mse'][0]:
      sys.exit(f'error: K {k}: Lloyd is no better than the codes it began with')
  return result


def table(found):
  """Markdown: mean and sample standard deviation over the seeds."""
  yield (
    '| quantizer | trained by | K | bits | seeds | MSE | dB above Lloyd '
    '| usage | effective dimension | seconds | leak, dB | wrong ids |'
  )
  yield '|' + '---|' * 12
  for (k, _, cell), entry in sorted(
    found.items(), key=lambda item: (item[0][:2], item[1]['mse'])
  ):
    runs = entry['runs']
    text = {
      name: f'{entry[name][0]:{form}} ± {entry[name][1]:{form}}'
      for name, form in (
        *(('mse', '.4f'), ('db', '.3f'), ('usage', '.3f')),
        *(('dimension', '.2f'), ('seconds', '.1f')),
      )
      if name in entry
    }
    exact = all(run['leak_exact'] for run in runs)
    leak = '0 (bit-exact)' if exact else f'{entry["leak_db"][0]:.2g}'
    wrong = '–'
    if runs[0]['checked_ids']:
      wrong = f'{sum(r["wrong_ids"] for r in runs):,} of '
      wrong += f'{sum(r["checked_ids"] for r in runs):,}'
    row = [cell, runs[0]['trained_by'], f'{k}', f'{entry["bits"][0]:.4g}']
    row += [str(len(runs)), text['mse'], text.get('db', '–'), text['usage']]
    row += [text['dimension'], text['seconds'], leak, wrong]
    yield '| ' + ' | '.join(row) + ' |'


def draw(found, path):
  """dB above Lloyd per quantizer, a panel per K."""
  from matplotlib.figure import Figure

  grids = sorted({where[:2] for where in found})
  panels = []
  for grid in grids:
    rows = [
      (cell, entry)
      for (*where, cell), entry in found.items()
      if tuple(where) == grid and 'db' in entry and cell != 'lloyd'
    ]
    panels.append(sorted(rows, key=lambda row: -row[1]['db'][0]))
  height = 0.9 + 0.32 * max(map(len, panels))
  figure = Figure(figsize=(9, height * len(grids)), layout='constrained')
  axes = figure.subplots(len(grids), squeeze=False)[:, 0]
  for ax, (k, rows), panel in zip(axes, grids, panels, strict=True):
    for y, (cell, entry) in enumerate(panel):
      mean, deviation = entry['db']
      color = 'C1' if cell.startswith(PREFIX) else 'C0'
      color = '0.6' if cell == 'random' else color
      ax.barh(y, mean, xerr=deviation, color=color, height=0.7)
      ax.annotate(
        f'{mean:.2f}',
        (max(mean, 0) + deviation, y),
        (4, 0),
        textcoords='offset points',
        va='center',
      )
    labels = [cell.replace('+', ', ') for cell, _ in panel]
    ax.set_yticks(range(len(panel)), labels)
    ax.axvline(0, color='0.3', linewidth=1)
    ax.margins(x=0.08, y=0.02)
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_xlabel('held-out error, dB above Lloyd')
    ax.set_title(f'K = {k}, {rows:,} latents', loc='left', fontsize='medium')
  figure.savefig(path, dpi=130)


def parse_arguments():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for flag in ('--data', '--data_dir', '--figure'):
    parser.add_argument(flag)
  for flag in ('--table', '--full'):
    parser.add_argument(flag, action='store_true')
  parser.add_argument('--output', required=True)
  for name, value in {
    'workdir': 'runs/matched',
    'cells': ','.join(CELLS),
    'K': 1024,
    'seeds': 3,
    'steps': 2000,
    'batch': 2048,
    'learning_rate': 3e-3,
    'rows': 2**18,
    'held_out': 2**16,
    'image_size': 32,
    'autoencoder_steps': 1000,
  }.items():
    parser.add_argument(f'--{name}', type=type(value), default=value)
  args = parser.parse_args()
  if not (args.table or args.data):
    parser.error('expected --data=folder:DIR or tfds:NAME, or --table')
  return args


def main():
  """Runs what is missing, then prints the table."""
  args = parse_arguments()
  if not args.table:
    import command_line

    command_line.prepare_backend()
    cells = args.cells.split(',')
    packages = ('torch', 'vector_quantize_pytorch')
    if not all(map(importlib.util.find_spec, packages)):
      print('left out: the peers need torch and vector-quantize-pytorch')
      cells = [cell for cell in cells if not cell.startswith(PREFIX)]
    z, held_out = load_latents(args)
    grids = [(args.K, args.rows)] + [(16384, 2**20)] * args.full
    for k, rows in grids:
      for seed in range(args.seeds):
        for cell in cells:
          key = {'data': args.data, 'cell': cell, 'K': k, 'seed': seed}
          key |= {'rows': rows, 'batch': args.batch, 'steps': args.steps}
          key['learning_rate'] = args.learning_rate
          if key in [{n: r[n] for n in KEY} for r in read(args.output)]:
            continue
          record = measure(key, z[:rows], held_out, args)
          with open(args.output, 'a') as stream:
            stream.write(json.dumps(record) + '\n')
          print(json.dumps(record), flush=True)
  found = summaries(read(args.output))
  print(*table(found), sep='\n')
  if args.figure:
    draw(found, args.figure)


if __name__ == '__main__':
  main()
