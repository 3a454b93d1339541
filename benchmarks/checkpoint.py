"""What a checkpoint costs, and what its SHA-256 sums add to that.

python benchmarks/checkpoint.py [--config=configs/cifar10.py] [--repeats=5]

Saves the initial state of a config with and without the sums, in turn, and
prints the median of: the time that training is held up, the time until the
step is complete, and the time to verify it before it is loaded.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rvq_jax.evaluation.report import hardware, versions  # noqa: E402
from rvq_jax.training import config as config_lib  # noqa: E402
from rvq_jax.training import manifest  # noqa: E402
from rvq_jax.training.checkpoints import Checkpoints  # noqa: E402
from rvq_jax.training.optimizer import make_optimizer  # noqa: E402
from rvq_jax.training.state import create_state  # noqa: E402


def initial_state(path: str):
  """The state before the first step of a config."""
  spec = importlib.util.spec_from_file_location('config', ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  flat = config_lib.check_config(module.get_config())
  model = config_lib.build_model(flat)
  return jax.jit(
    lambda: create_state(
      model,
      make_optimizer(lambda _: 1e-4),
      jax.random.key(0),
      image_size=flat['data.image_size'],
    )
  )()


def measure(state, folder: Path) -> tuple[float, float, float]:
  """Seconds that a save holds up, that it takes, and that verifying takes."""
  start = time.monotonic()
  with Checkpoints(folder) as checkpoints:
    start = time.monotonic()
    checkpoints.save(state, config={}, position={})
    blocked = time.monotonic() - start
  total = time.monotonic() - start
  start = time.monotonic()
  manifest.fault(folder / 'checkpoints' / '0')
  return blocked, total, time.monotonic() - start


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/cifar10.py')
  parser.add_argument('--repeats', type=int, default=5)
  options = parser.parse_args()
  state = initial_state(options.config)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  write, times = manifest.write, {'with sums': [], 'without': []}
  for i in range(options.repeats):
    for name, seen in times.items():
      manifest.write = write if name == 'with sums' else lambda step: None
      with tempfile.TemporaryDirectory() as folder:
        run = measure(state, Path(folder))
      if i or options.repeats == 1:  # the first warms up
        seen.append(run)
  print(f'{options.config}: state of {size:.0f} MB; {hardware()}')
  print(versions('jax', 'orbax-checkpoint'))
  for name, seen in times.items():
    blocked, total, verify = map(statistics.median, zip(*seen, strict=True))
    print(f'{name:<10} held up {blocked:.3f} s, complete in {total:.3f} s')
    if name == 'with sums':
      print(f'{"":<10} verified in {verify:.3f} s')


if __name__ == '__main__':
  main()
