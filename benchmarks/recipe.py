"""Which gradient, which codes, in which order: a grid of short runs.

Every cell is an ordinary run of configs/photos.py, or with --setting=cifar10 of
a small model of configs/cifar10.py, with what its name says; the metrics are
those of the validation split at the last step. A finished cell is one line of
the output and is not run again, so the same command resumes, and several may
run side by side.

Five estimators that the package does not have are tried too, see tried.py.

Command: python benchmarks/recipe.py --data=folder:DIR --cells=ste,rotation
  --seeds=3 --output=benchmarks/recipe_photos.jsonl
Table: python benchmarks/recipe.py --table --output=FILE [--cells=... --steps=N
  --figure=FILE.png]
Hardware: CPU; a cell of 2,500 steps takes about ten minutes on two cores.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'launch')]

import numpy as np  # noqa: E402
from tried import TRIED  # noqa: E402

# Part of a cell's name -> what it sets; parts are joined by '+'.
PARTS = {
  'rotation': {},
  'ste': {'model.estimator': 'ste'},
  'unscaled': {'model.estimator': 'rotation_unscaled'},
  'reflection': {'model.estimator': 'reflection'},
  'dynamic': {'model.estimator': 'dynamic_ste'},
  'diveq': {
    'model.estimator': 'diveq',
    'model.ema': False,
    'model.commitment_weight': 0.0,
    'model.codebook_weight': 0.0,
  },
  'distortion': {'model.split_by': 'distortion'},
  'group': {'model.norm': 'group'},
  'swish': {'model.activation': 'swish'},
  'cosine': {'model.cosine': True},
  'f4': {'model.factor': 4},
  'f8': {'model.factor': 8},
} | {name: {'model.estimator': name} for name in TRIED}
# Name of a part that ends in a number -> the field that it sets.
NUMBERS = {
  'late': 'model.quantize_after',
  'commitment': 'model.commitment_weight',
  'lr': 'optimizer.learning_rate',
  'decay': 'model.decay',
  'dim': 'model.code_dim',
  'K': 'model.codebook_size',
  'dead': 'model.dead_code_threshold',
  'steps': 'num_steps',
}
METRICS = (
  *('mse', 'psnr', 'usage', 'perplexity', 'relative_error'),
  *('latent_dimension', 'code_dimension', 'bits_per_image'),
)
GIT = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
COMMIT = subprocess.run(GIT, capture_output=True, text=True).stdout.strip()
CURVES = ('mse', 'encoder_norm', 'code_norm', 'mean_angle', 'replaced_codes')


def fields_of(cell: str) -> dict:
  """Config fields of a cell, as 'ste+late=500'."""
  fields = {}
  for part in cell.split('+'):
    name, _, value = part.partition('=')
    if value:
      fields[NUMBERS[name]] = json.loads(value)
    else:
      fields |= PARTS[name]
  return fields


def make_config(cell: str, seed: int, args):
  """The config of one run."""
  from configs import cifar10, photos

  if args.setting == 'photos':
    config = photos.get_config()
    config.data.colors, config.optimizer.learning_rate = False, 1e-3
    config.data.crop, config.data.crop_scale = 'random_resized', 0.1
  else:
    config = cifar10.get_config()
    config.batch_size, config.model.num_res_blocks = 32, 1
    config.model.codebook_size = 2048
  config.seed, config.num_steps = seed, args.steps
  config.eval_every = config.checkpoint_every = 0
  config.log_every = max(args.steps // 25, 1)
  config.data.name, config.data.split = args.data, 'official'
  config.data.data_dir = args.data_dir
  # The paper's method, whose parts the cell replaces.
  config.model.estimator, config.model.quantize_after = 'rotation', 0
  config.model.dead_code_threshold = 0.9
  config.update_from_flattened_dict(fields_of(cell))
  return config


def read_curves(workdir: Path) -> dict:
  """Training metrics of a run, a list each, and their steps."""
  curves = {}
  for record in read(workdir / 'metrics.jsonl'):
    if 'train/mse' in record:
      curves.setdefault('step', []).append(record['step'])
      for name in CURVES:
        # Without quantization only mse is there.
        value = record.get(f'train/{name}')
        value = None if value is None else float(f'{value:.4g}')
        curves.setdefault(name, []).append(value)
  return curves


def measure(cell: str, seed: int, args) -> dict | None:
  """Trains and evaluates one run; None while another process does."""
  from rvq_jax.evaluation.evaluate import evaluate_run
  from rvq_jax.training.loop import train

  workdir = Path(args.workdir) / cell / f'seed_{seed}'
  start = time.monotonic()
  try:
    train(make_config(cell, seed, args), workdir)
  except ValueError as error:
    if 'in use' in str(error):
      return None
    raise
  metrics = evaluate_run(workdir, split='validation')
  return {
    'cell': cell,
    'seed': seed,
    'steps': args.steps,
    'minutes': round((time.monotonic() - start) / 60, 1),
    'commit': COMMIT,
    'hardware': f'{os.cpu_count()} cores, {processor()}',
    **{name: metrics[name] for name in METRICS},
    'curves': read_curves(workdir),
  }


def processor() -> str:
  """Name of the CPU."""
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor()


def read(path) -> list[dict]:
  """The finished cells."""
  lines = Path(path).read_text().splitlines() if Path(path).exists() else []
  return [json.loads(line) for line in lines]


def finished(path) -> set[tuple]:
  """Cell, seed and steps of the finished cells."""
  return {(r['cell'], r['seed'], r['steps']) for r in read(path)}


def table(records) -> str:
  """Markdown: mean and sample standard deviation over the seeds of a cell."""
  lines = ['| cell | steps | seeds | ' + ' | '.join(METRICS) + ' |']
  lines.append('|' + '---|' * (3 + len(METRICS)))
  groups = {}
  for record in records:
    groups.setdefault((record['cell'], record['steps']), []).append(record)
  for (cell, steps), runs in sorted(
    groups.items(),
    key=lambda g: (g[0][1], statistics.mean(r['mse'] for r in g[1])),
  ):
    row = [cell, str(steps), str(len(runs))]
    for name in METRICS:
      values = [run[name] for run in runs]
      text = f'{statistics.mean(values):.5g}'
      if len(values) > 1:
        text += f' ± {statistics.stdev(values):.2g}'
      row.append(text)
    lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines)


def draw(records, cells, path) -> None:
  """Norm, angle and error over the steps of training, seed 0 of each cell."""
  from matplotlib.figure import Figure

  titles = {
    'encoder_norm': 'mean |e|',
    'mean_angle': 'mean angle of e and q, degrees',
    'mse': 'MSE in training',
  }
  figure = Figure(figsize=(11, 3.4), layout='constrained')
  axes = figure.subplots(1, len(titles))
  for record in records:
    if record['cell'] in cells and record['seed'] == 0:
      curves = record['curves']
      for ax, name in zip(axes, titles, strict=True):
        values = np.array(curves[name], float)  # None: NaN
        ax.plot(curves['step'], values, label=record['cell'])
  for ax, name in zip(axes, titles, strict=True):
    ax.set_title(titles[name], fontsize='medium')
    ax.set_xlabel('step')
    ax.set_yscale('log' if name == 'mse' else 'linear')
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylim(bottom=0)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=5,
    frameon=False,
  )
  figure.savefig(path, dpi=130)


def main():
  """Runs what is missing, or prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', help='folder:DIR or tfds:NAME')
  parser.add_argument('--data_dir', help='of tfds:NAME')
  parser.add_argument(
    '--setting', choices=('photos', 'cifar10'), default='photos'
  )
  parser.add_argument('--cells', default='rotation,ste')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=2500)
  parser.add_argument('--workdir', default='runs/recipe')
  parser.add_argument('--output', required=True)
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--figure', help='curves of the cells, FILE.png')
  args = parser.parse_args()
  if not args.table:
    import command_line

    command_line.prepare_backend()
    for seed in range(args.seeds):
      for cell in args.cells.split(','):
        key = (cell, seed, args.steps)
        if key in finished(args.output):
          continue
        record = measure(cell, seed, args)
        # Another process may have ended the run since, and written it.
        if record and key not in finished(args.output):
          with open(args.output, 'a') as stream:
            stream.write(json.dumps(record) + '\n')
          print(json.dumps(record), flush=True)
  records = read(args.output)
  print(table(records))
  if args.figure:
    of_length = [r for r in records if r['steps'] == args.steps]
    draw(of_length, args.cells.split(','), args.figure)


if __name__ == '__main__':
  main()
