"""Where a number comes from: hardware and versions, for beside it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax


def hardware() -> str:
  """Processor, cores and accelerator, as '2 cores of an AMD EPYC'."""
  cpu = platform.processor() or platform.machine()
  info = Path('/proc/cpuinfo')
  if info.exists():
    names = [x for x in info.read_text().splitlines() if 'model name' in x]
    cpu = names[0].split(':')[1].strip() if names else cpu
  cores = os.cpu_count()
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  devices = jax.devices()
  text = f'{cores} cores of {cpu}'
  if devices[0].platform != 'cpu':
    text = f'{len(devices)} x {devices[0].device_kind}, {text}'
  return text


def versions(*packages: str) -> str:
  """'jax 0.10.2, flax 0.12.6' of the packages named."""
  return ', '.join(f'{name} {version(name)}' for name in packages)
