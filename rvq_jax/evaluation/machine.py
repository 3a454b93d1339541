"""This machine: devices, their peaks, driver, power and memory."""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

STEADY = 2.0
"""Seconds of work before reading the power, which is a recent mean."""
PEAKS = {
  'GB200': (2500, 1250, 80),
  'B200': (2250, 1100, 75),
  'GH200|H200|H100': (989, 495, 67),
  'A100': (312, 156, 19.5),
  'L40S': (362, 183, 91.6),
  'L4': (121, 60, 30.3),
  'A10': (125, 62.5, 31.2),
  'RTX 5090$': (209.5, 104.8, 104.8),
  'RTX 4090$': (165.2, 82.6, 82.6),
  'RTX 3090$': (71, 35.6, 35.6),
  'V100': (None, None, 15.7),
  'T4': (None, None, 8.1),
}
"""GPU -> NVIDIA's dense peaks in bfloat16, TF32 and float32, TFLOP/s."""
_SLOWER = 'MIG|NVL|PCIe|Laptop'  # slower than the GPU of the same name


def peak_of(kind: str, dtype: str) -> tuple[float | None, str | None]:
  """Peak of a GPU in TFLOP/s, and the dtype of its products; None: unknown.

  NVIDIA GPUs multiply float32 in TF32, unless JAX's settings forbid it.
  """
  exact = jax.config.jax_default_matmul_precision in ('highest', 'float32')
  for name, (half, tf32, full) in PEAKS.items():
    if re.search(rf'\b({name})(\b|$)', kind) and not re.search(_SLOWER, kind):
      if dtype == 'float32':
        return (full, dtype) if exact or not tf32 else (tf32, 'TF32')
      return half, half and dtype
  return None, None


def hardware() -> str:
  """Devices and processor, as '1 x cpu, 2 cores of AMD EPYC'."""
  info, devices = Path('/proc/cpuinfo'), jax.devices()
  lines = info.read_text() if info.exists() else ''
  names = re.findall('model name.*: (.*)', lines) or [platform.machine()]
  cpu = f'{os.cpu_count()} cores of {names[0]}'
  return f'{len(devices)} x {devices[0].device_kind}, {cpu}'


def driver_and_watts(work: Callable, gpus: int):
  """Driver, and total power of the GPUs during `work`; None: unknown."""
  command = ['nvidia-smi', '--query-gpu=driver_version,power.draw']
  which = os.environ.get('CUDA_VISIBLE_DEVICES')
  command += ['--format=csv', *([f'--id={which}'] if which else [])]

  def ask():
    time.sleep(STEADY)
    options = {'capture_output': True, 'text': True, 'timeout': 10}
    try:
      return subprocess.run(command, **options).stdout
    except (OSError, subprocess.TimeoutExpired):
      return ''

  if not shutil.which(command[0]):
    return None, None
  with ThreadPoolExecutor(1) as pool:
    answer = pool.submit(ask)
    while not answer.done():
      work()
  rows = re.findall(r'^([\d.]+), (?:([\d.]+) W$)?', answer.result(), re.M)[
    :gpus
  ]
  watts = [float(row[1]) for row in rows if row[1]]
  driver = rows[0][0] if rows else None
  return driver, sum(watts) if len(watts) == gpus else None


def peak_memory() -> int | None:
  """Peak bytes in use: of the first GPU; on a CPU, of the process."""
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return (device.memory_stats() or {}).get('peak_bytes_in_use')
