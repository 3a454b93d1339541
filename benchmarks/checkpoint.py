"""What a checkpoint costs, and what its digests add to that.

python benchmarks/checkpoint.py [--config=configs/cifar10.py] [--repeats=5]

Saves the initial state of a config and reads it back, and prints the median of:
the time that training is held up, the share of the digests in it, the time
until the step is complete, and the time to restore and check it.
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

from rvq_jax.io import tree_digest  # noqa: E402
from rvq_jax.paper.report import hardware, versions  # noqa: E402
from rvq_jax.training import config as config_lib  # noqa: E402
from rvq_jax.training.build import build_model  # noqa: E402
from rvq_jax.training.checkpoints import Checkpoints  # noqa: E402
from rvq_jax.training.optimizer import make_optimizer  # noqa: E402
from rvq_jax.training.state import create_state  # noqa: E402


def initial_state(path: str):
  """The state before the first step of a config."""
  spec = importlib.util.spec_from_file_location('config', ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  flat = config_lib.check_config(module.get_config())
  model = build_model(flat)
  return jax.jit(
    lambda: create_state(
      model,
      make_optimizer(lambda _: 1e-4),
      jax.random.key(0),
      image_size=flat['data.image_size'],
      batch_size=flat['batch_size'],
    )
  )()


def measure(state, folder: Path) -> dict[str, float]:
  """Seconds of each part of a save and of the restore."""
  start = time.monotonic()
  tree_digest(state)
  seconds = {'digests': time.monotonic() - start}
  with Checkpoints(folder) as checkpoints:
    start = time.monotonic()
    checkpoints.save(state, config={}, position={})
    seconds['held up'] = time.monotonic() - start
  seconds['complete'] = time.monotonic() - start
  with Checkpoints(folder, read_only=True) as checkpoints:
    start = time.monotonic()
    checkpoints.restore(state, 0)
    seconds['restored'] = time.monotonic() - start
  return seconds


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/cifar10.py')
  parser.add_argument('--repeats', type=int, default=5)
  options = parser.parse_args()
  state = initial_state(options.config)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  runs = []
  for _ in range(options.repeats + 1):
    with tempfile.TemporaryDirectory() as folder:
      runs.append(measure(state, Path(folder)))
  print(f'{options.config}: state of {size:.0f} MB; {hardware()}')
  print(versions('jax', 'orbax-checkpoint'))
  for name in runs[0]:  # the first run warms up
    median = statistics.median(run[name] for run in runs[1:])
    print(f'{name:<10} {median:.3f} s')


if __name__ == '__main__':
  main()
