"""The referee: which quantizer has the least error on the same latents.

  python benchmarks/matched.py --data=folder:DIR|tfds:NAME [--data_dir=DIR]
    --output=benchmarks/matched.jsonl [--figure=FILE.png] [--table]

A small autoencoder without a quantizer is trained on the images and frozen.
Every quantizer sees its latents [N, 16], moved to mean 0 and scaled to variance
1 as a whole: the same batches in the same order per seed, and only its own
loss. Latents of other images are held out. `lloyd` is 100 iterations of k-means
over all training latents from K of them, `random` its start; the error of all
others is in dB above `lloyd`.

A cell is a name of `registry.QUANTIZERS`, or `peer:CLASS` of
vector-quantize-pytorch (`pip install torch==2.13.0 vector-quantize-pytorch`;
left out without it), then '+argument=value' per argument that is no default.
`residual` and `product` spend the same bits on two codes of sqrt(K). Adam has
one learning rate for all, which falls to 0 by a cosine. A finished cell is a
line of the output; the same command resumes.

Two thirds of the time go to the peers (OMP_NUM_THREADS=1 is faster for them).
`--full` adds K = 16384 with a million latents: an estimated 15 hours.
"""

import importlib.util
import json
import math
import sys
import time

import common
import numpy as np
import tried
from matched_latents import batches, load_latents
from matched_quantizers import PREFIX, Lloyd, Ours, Peer

from rvq_jax import metrics

LLOYD_ITERATIONS = 100
CELLS = (
  *('random', 'lloyd', 'simvq', 'fsq', 'peer:SimVQ', 'peer:FSQ', 'peer:LFQ'),
  *('peer:VectorQuantize', 'peer:VectorQuantize+dead=0.1'),
  'peer:VectorQuantize+directional_reparam=true',
  'peer:VectorQuantize+directional_reparam=true+dead=0.1',
  *(
    cell + threshold
    for threshold in ('', '+dead_code_threshold=0.1')
    for cell in (
      *('vq', 'vq+split_by=distortion', 'vq+ema=false'),
      *('residual', 'product'),
    )
  ),
)
SETTING = ('data', 'K', 'rows', 'batch', 'steps', 'learning_rate')
FORMS = {
  'mse': '.4f',
  'db': 'z.3f',
  'usage': '.3f',
  'dimension': '.2f',
  'cpu_seconds': '.0f',
}
HEADER = (
  *('quantizer', 'trained by', 'bits', 'seeds', 'MSE', 'dB above Lloyd'),
  *('usage', 'effective dimension', 'CPU seconds', 'leak, dB', 'wrong ids'),
)
COLUMNS = ('mse', 'usage', 'dimension', 'cpu_seconds', 'leak_db')


def make_quantizer_of(cell, k, seed, args):
  """The quantizer of a cell, as 'vq+decay=0.999'."""
  name, *parts = cell.split('+')
  options = {}
  for part in parts:
    if part in tried.CHANGES:
      continue
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
  wrong = [int(np.sum(common.excess(*s) > 0)) for s in searches]
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
    'wrong_ids': sum(wrong) if searches else None,
    'checked_ids': len(x) * len(searches),
    'seconds': round(seconds, 1),
    'cpu_seconds': round(cpu, 1),
    'hardware': common.hardware(),
  }


def summaries(records):
  """Setting -> {cell: {name: (mean, sample std)}}, with `db` above Lloyd."""
  groups = {}
  for record in records:
    setting = tuple(record[name] for name in SETTING)
    cells = groups.setdefault(setting, {})
    cells.setdefault(record['cell'], []).append(record)
  result = {}
  for setting, cells in groups.items():
    columns = {
      cell: {name: [run[name] for run in runs] for name in COLUMNS}
      for cell, runs in cells.items()
    }
    if 'lloyd' in cells:
      reference = np.mean(columns['lloyd']['mse'])
      for values in columns.values():
        values['db'] = [10 * math.log10(x / reference) for x in values['mse']]
      if 'random' in cells and min(columns['random']['db']) <= 0:
        sys.exit('error: Lloyd is no better than the codes that it began with')
    result[setting] = {
      cell: {name: common.spread(x) for name, x in columns[cell].items()}
      | {'runs': runs}
      for cell, runs in cells.items()
    }
  return result


def caption(setting):
  """A setting in words."""
  data, k, rows, batch, steps, rate = setting
  return (
    f'K = {k}, {rows:,} latents of {data}, {steps:,} batches of {batch:,}, '
    f'learning rate of Adam {rate:g}'
  )


def table(results):
  """Markdown: mean and sample standard deviation over the seeds."""
  for setting, cells in sorted(results.items()):
    yield f'\n{caption(setting)}\n'
    yield common.header(*HEADER)
    for cell, entry in sorted(cells.items(), key=lambda item: item[1]['mse']):
      runs = entry['runs']
      row = [cell, runs[0]['trained_by'], f'{runs[0]["bits"]:.4g}', len(runs)]
      for name, form in FORMS.items():
        mean, deviation = entry.get(name, (math.nan, math.nan))
        text = '–' if math.isnan(mean) else f'{mean:{form}}'
        if not math.isnan(deviation):
          text += f' ± {deviation:{form}}'
        row.append(text)
      exact = all(run['leak_exact'] for run in runs)
      row.append('0 (bit-exact)' if exact else f'{entry["leak_db"][0]:.1g}')
      checked = sum(run['checked_ids'] for run in runs)
      wrong = sum(run['wrong_ids'] or 0 for run in runs)
      row.append(f'{wrong:,} of {checked:,}' if checked else '–')
      yield common.row(*row)


def draw(results, path):
  """dB above Lloyd per quantizer, a panel per setting."""
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  height = 1.2 + 0.32 * max(map(len, results.values()))
  figure = Figure(figsize=(9, height * len(results)), layout='constrained')
  axes = figure.subplots(len(results), squeeze=False)[:, 0]
  for ax, (setting, cells) in zip(axes, sorted(results.items()), strict=True):
    means = {c: entry['db'] for c, entry in cells.items() if 'db' in entry}
    means.pop('lloyd', None)
    ordered = sorted(means.items(), key=lambda item: -item[1][0])
    for cell, (mean, deviation) in ordered:
      color = 'C1' if cell.startswith(PREFIX) else 'C0'
      color = '0.6' if cell == 'random' else color
      name = cell.removeprefix(PREFIX).replace('+', ', ')
      style = {'color': color, 'xerr': np.nan_to_num(deviation), 'height': 0.7}
      bar = ax.barh(name, mean, **style)
      ax.bar_label(bar, fmt='%.2f', padding=4)
    names = {'C0': 'rvq_jax', 'C1': 'vector-quantize-pytorch'}
    patches = [Patch(color=color, label=name) for color, name in names.items()]
    ax.legend(handles=patches, frameon=False)
    ax.axvline(0, color='0.3', linewidth=1)
    ax.margins(x=0.08, y=0.02)
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_xlabel('held-out error, dB above Lloyd')
    ax.set_title(caption(setting), loc='right', fontsize='medium')
  figure.savefig(path, dpi=130)


def parse_arguments():
  """The command line."""
  paths = dict.fromkeys(('data', 'data_dir', 'figure'))
  parser = common.parser(
    __doc__,
    **paths,
    table=False,
    full=False,
    output=str,
    workdir='runs/matched',
    cells=','.join(CELLS),
    K=1024,
    seeds=3,
    steps=2000,
    batch=2048,
    learning_rate=3e-3,
    rows=2**18,
    held_out=2**16,
    image_size=32,
    autoencoder_steps=1000,
  )
  args = parser.parse_args()
  if not (args.table or args.data):
    parser.error('expected --data=folder:DIR or tfds:NAME, or --table')
  return args


def main():
  """Runs the missing cells, then prints the table."""
  args = parse_arguments()
  if not args.table:
    common.prepare_backend()
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
          if not common.is_finished(args.output, key):
            with tried.changes(cell):
              record = measure(key, z[:rows], held_out, args)
            common.append_record(args.output, record)
  results = summaries(common.read_records(args.output))
  print(*table(results), sep='\n')
  if args.figure:
    draw(results, args.figure)


if __name__ == '__main__':
  main()
