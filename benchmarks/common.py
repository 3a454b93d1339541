"""What the benchmarks share: arguments, timing, tables, configs, the step.

A benchmark is run as `python benchmarks/NAME.py` and imports this module before
rvq_jax, so that it measures this checkout, whether it is installed or not.
"""

import argparse
import importlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Used by the benchmarks from here, as the functions below.
from rvq_jax.evaluation.machine import hardware  # noqa: E402, F401
from rvq_jax.paper.report import versions  # noqa: E402, F401
from rvq_jax.training.backend import prepare_backend  # noqa: E402, F401
from rvq_jax.training.build import build_step  # noqa: E402
from rvq_jax.training.config import check_config  # noqa: E402

PEERS = ('torch', 'vector-quantize-pytorch')


def parser(doc: str, **flags: Any) -> argparse.ArgumentParser:
  """The command line of a benchmark with this docstring.

  A flag's value is its default: False is a switch, None an optional text, `str`
  a required text; a tuple holds the choices, the default first; a list is one
  value or more.
  """
  result = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, value in flags.items():
    options = {'default': value, 'type': type(value)}
    if value is False:
      options = {'action': 'store_true'}
    elif value is None:
      options = {}
    elif value is str:
      options = {'required': True}
    elif isinstance(value, tuple):
      options = {'choices': value, 'default': value[0]}
    elif isinstance(value, list):
      options |= {'nargs': '+', 'type': type(value[0])}
    result.add_argument(f'--{name}', **options)
  return result


def use_cores() -> None:
  """Keeps the process on two cores; to be called before others count them."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0))


def resident(pid: int | str = 'self', field: str = 'VmRSS') -> int:
  """Bytes of a process in memory, VmHWM: at most; 0 where none are told."""
  try:
    text = Path(f'/proc/{pid}/status').read_text()
  except OSError:
    return 0
  found = re.search(rf'{field}:\s*(\d+)', text)
  return 1024 * int(found[1]) if found else 0


def in_turn(calls: dict[str, Callable], turns: int) -> dict[str, list]:
  """Name -> results per turn, for calls that take turns."""
  results = {name: [] for name in calls}
  for _ in range(turns):
    for name, call in calls.items():
      results[name].append(call())
  return results


def seconds(call: Callable) -> float:
  """Wall time until the result of a call is there."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def measure(
  calls: dict[str, Callable], repeats: int, *, pause: float = 0.0
) -> dict[str, list[float]]:
  """Name -> milliseconds per turn; each call compiles first, untimed.

  Before each call are `pause` seconds, as threads of the one before may spin.
  """

  def timed(call):
    time.sleep(pause)
    return 1e3 * seconds(call)

  for call in calls.values():
    seconds(call)
  timed_calls = {n: lambda c=c: timed(c) for n, c in calls.items()}
  return in_turn(timed_calls, repeats)


def excess(x, codes, ids, block: int = 4096) -> np.ndarray:
  """How much farther than the nearest code each row's own is, as a share.

  In float64, around the mean of the codes: far from 0 the squares would have no
  digits left for a distance.
  """
  middle, result = np.mean(codes, axis=0, dtype=np.float64), []
  codes = codes - middle
  half = 0.5 * np.sum(codes**2, axis=1)
  for start in range(0, len(x), block):
    e, own = x[start : start + block] - middle, ids[start : start + block]
    best = np.argmax(e @ codes.T - half, axis=1)
    own, best = (np.sum((e - codes[i]) ** 2, axis=1) for i in (own, best))
    result.append(own / np.maximum(best, 1e-300) - 1)
  return np.concatenate(result)


def ratio(numbers, others) -> float:
  """The median of number / other, where both are of the same turn."""
  return statistics.median(a / b for a, b in zip(numbers, others, strict=True))


def row(*cells: Any) -> str:
  """A row of a Markdown table."""
  return f'| {" | ".join(map(str, cells))} |'


def header(*cells: str) -> str:
  """The first two lines of a Markdown table."""
  return f'{row(*cells)}\n{"|---" * len(cells)}|'


def spread(values) -> tuple[float, float]:
  """Mean and sample standard deviation; NaN for one value."""
  several = len(values) > 1
  return statistics.mean(values), statistics.stdev(values) if several else nan


def read_records(path) -> list[dict]:
  """The lines of a JSONL file; none if there is no file."""
  lines = Path(path).read_text().splitlines() if Path(path).exists() else []
  return [json.loads(line) for line in lines]


def is_finished(path, key: dict) -> bool:
  """Whether a JSONL file has a record with these values."""
  return any(key.items() <= record.items() for record in read_records(path))


def append_record(path, record: dict) -> None:
  """Adds a line to a JSONL file, if one is given, and prints it."""
  line = json.dumps(record)
  if path:
    with open(path, 'a') as stream:
      stream.write(line + '\n')
  print(line, flush=True)


def import_torch():
  """torch on our cores, and on the GPU where JAX has one."""
  try:
    import torch
  except ImportError as error:
    sys.exit(f'the peer needs torch: {error}')
  torch.set_num_threads(cores())
  if jax.default_backend() == 'gpu':
    torch.set_default_device('cuda')
    torch.backends.cudnn.benchmark = True
  return torch


def make_peer(dim: int, codebook_size: int, *, seed: int = 0, **options):
  """torch, and the VectorQuantize of vector-quantize-pytorch.

  Its arguments are those of our layer, where `options` has no others.
  """
  torch = import_torch()
  try:
    from vector_quantize_pytorch import VectorQuantize
  except ImportError as error:
    sys.exit(f'the peer needs vector-quantize-pytorch: {error}')
  torch.manual_seed(seed)
  options = {
    'decay': 0.99,
    'commitment_weight': 0.25,
    'rotation_trick': True,
    'kmeans_init': False,
  } | options
  return torch, VectorQuantize(dim=dim, codebook_size=codebook_size, **options)


def load_config(name: str, *arguments):
  """The ConfigDict of configs/NAME.py."""
  module = importlib.import_module(f'rvq_jax.configs.{name}')
  return module.get_config(*arguments)


def make_step(config):
  """The checked flat config and its `TrainStep`, in the last phase."""
  flat = check_config(config)
  return flat, build_step(flat, flat['num_steps'] or 10**6)
