"""The GPU campaign: all that docs/results.md calls "not run", in one command.

  python benchmarks/gpu.py --data_dir=DIR --output=DIR [--minutes=28]
    [--stages=edges,resume,...] [--rehearse]

Stages, in the order of worth:

  edges       the quantizer's edge cases and exact search against float64
  resume      a resumed run against an uninterrupted one, deterministic
  estimators  four estimators x 3 seeds x 20 epochs, CIFAR-10 f4, bfloat16
  long        300 epochs of f4 with the best of them
  quantizer   its step at N = 131,072, K = 2^14 ... 2^18, beside matmuls
  step        train steps of CIFAR-10 and ImageNet: images/s, memory, profile
  encode      images/s of tokens from images of 256 pixels

Needs jax with CUDA, our requirements and DIR, the tfds directory that holds
CIFAR-10. Every part is a separate process that has the GPU to itself. The
output holds gpu.json, table.md, figures and the runs. What is finished there is
not run again and runs resume, so the same command goes on where the last one
ended; --minutes is a budget for this one. --rehearse takes the embedded
photographs and tiny sizes, on any backend.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

from rvq_jax.io import write_atomic

# Stage -> minutes it may take.
STAGES = {
  'edges': 2,
  'resume': 2,
  'estimators': 12,
  'long': 12,
  'quantizer': 3,
  'step': 5,
  'encode': 2,
}
ESTIMATORS = ('ste', 'rotation', 'rotation_unscaled', 'best')
SEEDS = 3
METRICS = ('mse', 'psnr', 'usage', 'perplexity', 'bits_per_image')
EPOCHS = {'estimators': 20, 'long': 300}
TINY = (
  *('--config.num_steps=4', '--config.batch_size=4', '--config.eval_every=0'),
  '--config.optimizer.warmup_steps=0',
  *('--config.model.widths=(8, 16)', '--config.model.num_res_blocks=0'),
  *('--config.model.num_heads=2', '--config.model.code_dim=8'),
  *('--config.model.codebook_size=16', '--config.data.image_size=32'),
)


class Campaign:
  """The finished parts, the budget and where both are kept."""

  def __init__(self, args):
    self.args, self.folder = args, Path(args.output).resolve()
    self.folder.mkdir(parents=True, exist_ok=True)
    self.file = self.folder / 'gpu.json'
    self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
    self.end = time.monotonic() + 60 * args.minutes

  def keep(self, part: str, value):
    """Adds a finished part to gpu.json."""
    self.done[part] = value
    write_atomic(self.file, json.dumps(self.done, indent=1))
    print(f'{part}: {json.dumps(value)[:300]}', flush=True)

  def run(self, part: str, command, seconds: float) -> bool:
    """Runs a process; after `seconds` it is asked to save. Whether it ended."""
    seconds = min(seconds, self.end - time.monotonic())
    if seconds < 5:
      print(f'{part}: no time left', flush=True)
      return False
    log = self.folder / f'{part.replace("/", "_")}.log'
    with log.open('a') as stream:
      child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=common.ROOT,
        stdout=stream,
        stderr=subprocess.STDOUT,
      )
      try:
        code = child.wait(seconds)
      except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        try:
          child.wait(60)
        except subprocess.TimeoutExpired:
          child.kill()
        print(f'{part}: stopped after {seconds:.0f} s', flush=True)
        return False
    if code:
      lines = log.read_text().strip().splitlines()[-3:]
      print(f'{part}: exit {code}:', *lines, sep='\n  ', flush=True)
    return code == 0

  def train(self, part: str, estimator: str, seed: int, epochs, seconds):
    """A run of launch/main.py; its test metrics are the part."""
    best = estimator == 'best'
    workdir = self.folder / 'runs' / part
    flags = [f'--config.seed={seed}', f'--workdir={workdir}']
    if not best:
      flags.append(f'--config.model.estimator={estimator}')
    if self.args.rehearse:
      flags = ['--config=configs/photos.py', *flags, *TINY]
      flags.append(f'--config.model.quantize_after={2 * best}')
    else:
      steps = int(epochs * 50_000 / 128)
      flags = [
        f'--config=configs/cifar10.py:f4{",best" * best}',
        *flags,
        f'--config.data.data_dir={self.args.data_dir}',
        '--config.data.split=official',
        '--config.model.dtype=bfloat16',
        f'--config.num_steps={steps}',
        f'--config.eval_every={max(steps // 20, 1)}',
        f'--config.checkpoint_every={max(steps // 20, 1)}',
      ]
      if best:  # the config's value exceeds a short run
        late = min(10_000, steps // 10)
        flags.append(f'--config.model.quantize_after={late}')
    start = time.monotonic()
    if self.run(part, ['launch/main.py', *flags], seconds):
      path = workdir / 'evaluation' / 'test' / 'metrics.json'
      metrics = json.loads(path.read_text())
      value = {name: metrics[name] for name in METRICS}
      value['seconds_of_the_last_call'] = round(time.monotonic() - start)
      self.keep(part, value)

  def measure(self, stage: str, seconds: float):
    """Runs a stage of gpu_stages.py."""
    result = self.folder / f'{stage}.json'
    command = ['benchmarks/gpu_stages.py', stage, f'--output={result}']
    command += ['--rehearse'] * self.args.rehearse
    command += [f'--profile={self.folder / "profile"}']
    if self.run(stage, command, seconds):
      self.keep(stage, json.loads(result.read_text()))

  def parts(self, stage: str) -> dict:
    """The parts of a stage; estimator and seed of those that are runs."""
    if stage == 'long':
      return {stage: ('best', 0)}
    if stage != 'estimators':
      return {stage: None}
    seeds = range(1 if self.args.rehearse else SEEDS)
    names = ('ste', 'best') if self.args.rehearse else ESTIMATORS
    return {f'{stage}/{n}_{seed}': (n, seed) for seed in seeds for n in names}

  def stage(self, name: str, minutes: float):
    """Runs the missing parts of a stage."""
    end = time.monotonic() + 60 * minutes
    for part, run in self.parts(name).items():
      seconds = end - time.monotonic()
      if part in self.done or seconds < 5:
        continue
      if run:
        self.train(part, *run, EPOCHS[name], seconds)
      else:
        self.measure(name, seconds)


def number(value) -> str:
  """Four significant digits."""
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def table(done: dict) -> str:
  """The results as Markdown, in the form of docs/results.md."""
  lines = []
  trained = {k: v for k, v in done.items() if 'mse' in v}
  if trained:
    lines.append(common.header('run', *METRICS))
    for part, metrics in trained.items():
      lines.append(common.row(part, *(number(metrics[n]) for n in METRICS)))
  for name in ('edges', 'resume', 'quantizer', 'step', 'encode'):
    rows = done.get(name, {}).get('rows')
    if rows:
      lines += ['', f'{name}: {done[name]["hardware"]}', '']
      lines.append(common.header(*rows[0]))
      lines += [common.row(*map(number, row.values())) for row in rows]
  return '\n'.join(lines) + '\n'


def main():
  """Runs the stages and writes the table."""
  stages = ','.join(STAGES)
  flags = {'minutes': 28.0, 'stages': stages, 'rehearse': False}
  parser = common.parser(__doc__, data_dir=None, output=str, **flags)
  args = parser.parse_args()
  if not (args.data_dir or args.rehearse):
    parser.error('expected --data_dir, the tfds directory that holds cifar10')
  stages = args.stages.split(',')
  if unknown := set(stages) - set(STAGES):
    parser.error(f'expected stages of {list(STAGES)}, got {sorted(unknown)}')
  campaign = Campaign(args)
  for name in stages:
    campaign.stage(name, STAGES[name])
    (campaign.folder / 'table.md').write_text(table(campaign.done))
  print(table(campaign.done))
  print(f'everything is in {campaign.folder}')
  for name, part in campaign.done.items():
    for row in part.get('rows', []):
      if not row.get('sound', True):
        sys.exit(f'{name} is not sound: {row}')
  parts = [part for name in stages for part in campaign.parts(name)]
  missing = [part for part in parts if part not in campaign.done]
  if missing:
    sys.exit(f'not done: {", ".join(missing)}; the same command goes on')


if __name__ == '__main__':
  main()
