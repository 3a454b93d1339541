"""Which gradient, which codes, in which order: a grid of short runs.

A cell is an ordinary run of configs/photos.py, or with --setting=cifar10 or
tiny (Tiny-ImageNet, 64x64) of a small model of configs/cifar10.py, with the
changes that its name lists. It is measured on the validation split at the last
step. A finished cell is one line of the output and is not run again, so the
same command resumes, and several may run side by side. tried.py adds three
estimators and more.

  python benchmarks/recipe.py --data=folder:DIR --cells=ste,rotation
    --output=benchmarks/recipe_photos.jsonl [--figure=FILE.png] [--table]
"""

import json
import statistics
import time
from pathlib import Path

import common
import numpy as np
import tried

from rvq_jax.commands.benchmark import commit

# Part of a cell's name -> config fields that it sets; '+' joins parts.
PARTS = {
  'rotation': {},
  'ste': {'model.estimator': 'ste'},
  'unscaled': {'model.estimator': 'rotation_unscaled'},
  'reflection': {'model.estimator': 'reflection'},
  'dynamic': {'model.estimator': 'dynamic_ste'},
  'distortion': {'model.split_by': 'distortion'},
  'group': {'model.norm': 'group'},
  'group_blocks': {'model.norm': 'group_blocks'},
  'swish': {'model.activation': 'swish'},
  'cosine': {'model.cosine': True},
  'multiscale': {'model.quantizer': 'multiscale'},
  'vqgan': {'model.network': 'vqgan', 'model.z_channels': 64},
  'f4': {'model.factor': 4},
  'f8': {'model.factor': 8},
} | {name: {'model.estimator': name} for name in tried.TRIED}
# Name of a part that ends in a number -> the field that it sets.
NUMBERS = {
  'late': 'model.quantize_after',
  'commitment': 'model.commitment_weight',
  'lr': 'optimizer.learning_rate',
  'decay': 'model.decay',
  'dim': 'model.code_dim',
  'K': 'model.codebook_size',
  'split': 'model.split_fraction',
  'ch': 'model.ch',
  'mult': 'model.ch_mult',
  'blocks': 'model.num_res_blocks',
  'warmup': 'optimizer.warmup_steps',
  'b2': 'optimizer.b2',
  'wd': 'optimizer.weight_decay',
  'clip': 'optimizer.clip_norm',
  'average': 'optimizer.params_ema',
  'dead': 'model.dead_code_threshold',
  'steps': 'num_steps',
}
METRICS = (
  *('mse', 'psnr', 'usage', 'perplexity', 'relative_error'),
  *('latent_dimension', 'latent_components_99', 'code_dimension'),
  'bits_per_image',
)
CURVES = ('mse', 'encoder_norm', 'code_norm', 'mean_angle', 'replaced_codes')


def fields_of(cell: str) -> dict:
  """Config fields of a cell, as 'ste+late=500'."""
  fields = {}
  for part in cell.split('+'):
    name, _, value = part.partition('=')
    if name in tried.CHANGES:
      continue
    if value:
      fields[NUMBERS[name]] = json.loads(value)
    else:
      fields |= PARTS[name]
  return fields


def make_config(cell: str, seed: int, args):
  """The config of one run."""
  if args.setting == 'photos':
    config = common.load_config('photos')
    # As the config was when the cells of recipe_photos.jsonl ran.
    config.model.code_dim, config.model.commitment_weight = 32, 0.25
    config.model.norm, config.model.activation = 'batch', 'leaky_relu'
    config.optimizer.b2, config.optimizer.warmup_steps = 0.999, 20
    config.data.colors, config.optimizer.learning_rate = False, 1e-3
    config.data.crop, config.data.crop_scale = 'random_resized', 0.1
  else:
    config = common.load_config('cifar10')
    config.batch_size, config.model.num_res_blocks = 32, 1
    config.model.codebook_size = 2048
  if args.setting == 'tiny':
    config.data.image_size, config.model.num_res_blocks = 64, 2
    config.model.widths, config.model.num_heads = (32, 64, 128), 4
    config.model.codebook_size = 4096
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
  for record in common.read_records(workdir / 'metrics.jsonl'):
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
  from rvq_jax.training.loop import train

  workdir = Path(args.workdir) / cell / f'seed_{seed}'
  start = time.monotonic()
  try:
    with tried.changes(cell):
      metrics = train(make_config(cell, seed, args), workdir)
  except ValueError as error:
    if 'in use' in str(error):
      return None
    raise
  return {
    'cell': cell,
    'seed': seed,
    'steps': args.steps,
    'minutes': round((time.monotonic() - start) / 60, 1),
    'commit': commit(),
    'hardware': common.hardware(),
    **{name: metrics[name] for name in METRICS},
    'curves': read_curves(workdir),
  }


def table(records) -> str:
  """Markdown: mean and sample standard deviation over the seeds of a cell."""
  lines = [common.header('cell', 'steps', 'seeds', *METRICS)]
  groups = {}
  for record in records:
    groups.setdefault((record['cell'], record['steps']), []).append(record)
  for (cell, steps), runs in sorted(
    groups.items(),
    key=lambda g: (g[0][1], statistics.mean(r['mse'] for r in g[1])),
  ):
    row = [cell, steps, len(runs)]
    for name in METRICS:
      if name not in runs[0]:  # a metric of later versions
        row.append('–')
        continue
      mean, deviation = common.spread([run[name] for run in runs])
      more = f' ± {deviation:.2g}' if len(runs) > 1 else ''
      row.append(f'{mean:.5g}{more}')
    lines.append(common.row(*row))
  return '\n'.join(lines)


def draw(records, cells, path) -> None:
  """Norm, angle and error over the steps of training, seed 0 of each cell."""
  from matplotlib.figure import Figure

  titles = {
    'encoder_norm': 'mean |e|',
    'mean_angle': 'mean angle of e and q, degrees',
    'mse': 'MSE in training',
  }
  chosen = [r for r in records if r['cell'] in cells and r['seed'] == 0]
  figure = Figure(figsize=(11, 3.4), layout='constrained')
  axes = figure.subplots(1, len(titles))
  for ax, (name, title) in zip(axes, titles.items(), strict=True):
    for record in chosen:
      values = np.array(record['curves'][name], float)  # None: NaN
      ax.plot(record['curves']['step'], values, label=record['cell'])
    scale = 'log' if name == 'mse' else 'linear'
    ax.set(title=title, xlabel='step', yscale=scale)
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylim(bottom=0)
  lines = axes[0].get_legend_handles_labels()
  figure.legend(*lines, loc='outside lower center', ncols=5, frameon=False)
  figure.savefig(path, dpi=130)


def main():
  """Runs the missing cells, then prints the table."""
  args = common.parser(
    __doc__,
    data=None,
    data_dir=None,
    setting=('photos', 'cifar10', 'tiny'),
    cells='rotation,ste',
    seeds=3,
    steps=2500,
    workdir='runs/recipe',
    output=str,
    table=False,
    figure=None,
  ).parse_args()
  if not args.table:
    common.prepare_backend()
    for seed in range(args.seeds):
      for cell in args.cells.split(','):
        key = {'cell': cell, 'seed': seed, 'steps': args.steps}
        if common.is_finished(args.output, key):
          continue
        record = measure(cell, seed, args)
        # Another process may have ended the run since, and written it.
        if record and not common.is_finished(args.output, key):
          common.append_record(args.output, record)
  records = common.read_records(args.output)
  print(table(records))
  if args.figure:
    of_length = [r for r in records if r['steps'] == args.steps]
    draw(of_length, args.cells.split(','), args.figure)


if __name__ == '__main__':
  main()
