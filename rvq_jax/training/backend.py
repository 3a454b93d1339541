"""What a program sets before JAX starts its backend, for a run and all else."""

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
from pathlib import Path

import jax
from jax._src.xla_bridge import backends_are_initialized

DETERMINISTIC = '--xla_gpu_deterministic_ops=true'


def prepare_backend(*, share_gpus: bool = False) -> None:
  """Keeps compiled programs on disk and freed memory; what users set wins.

  Programs are kept per kind of CPU, since home directories are shared. XLA:CPU
  allocates its temporaries in each call: glibc would return them to the kernel,
  and page faults would be a third of a step; the convolutions of YNNPACK, which
  it calls unless told otherwise, cost another third (docs/scale.md). A GPU that
  JAX cannot use is said in one line.

  Args:
    share_gpus: take GPU memory when it is needed, not three quarters of it at
      the start, so that PyTorch finds some in the same process.
  """
  if share_gpus:
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  # Without a home directory `~` stays.
  if not jax.config.jax_compilation_cache_dir and os.path.isabs(home):
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    flags_of_cpu = re.search('^flags.*|$', text, re.M)[0].encode()
    kind = (
      f'{platform.machine()}-{hashlib.sha256(flags_of_cpu).hexdigest()[:8]}'
    )
    folder = Path(home, 'rvq_jax', 'compiled', kind)
    jax.config.update('jax_compilation_cache_dir', str(folder))
  option = '--xla_cpu_experimental_ynn_fusion_type='
  flags = os.environ.get('XLA_FLAGS', '')
  if option not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {option}-individual_convolution'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  on_cpu = (jax.config.jax_platforms or ('' if plugins else 'cpu')) == 'cpu'
  chosen = re.search('MALLOC_|GLIBC_TUNABLES', ' '.join(os.environ))
  if on_cpu and not chosen and platform.libc_ver()[0] == 'glibc':
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of malloc.h; one arena,
    # because those of threads cannot grow beyond 64 MiB.
    for option in ((-4, 0), (-1, -1), (-8, 1)):
      ctypes.CDLL(None).mallopt(*option)
  gpu = any(Path('/proc/driver/nvidia/gpus').glob('*'))
  advice = '' if jax.config.jax_platforms else gpu_advice(gpu)
  if advice:
    logging.warning('%s', advice)


def gpu_advice(gpu: bool) -> str:
  """What to install where JAX cannot use an NVIDIA GPU; '' if it can.

  JAX leaves a plugin of another version than jaxlib aside, and runs on the CPU.

  Args:
    gpu: whether the machine has one.
  """
  jaxlib, others = importlib.metadata.version('jaxlib'), ''
  for cuda in ('cuda12', 'cuda13'):
    try:
      found = importlib.metadata.version(f'jax-{cuda}-plugin')
    except importlib.metadata.PackageNotFoundError:
      continue
    if found == jaxlib:
      return ''
    others = (
      f'jax-{cuda}-plugin {found} does not fit jaxlib {jaxlib}, so that JAX '
      f'sees no GPU: pip install "jax[{cuda}]=={jaxlib}"'
    )
  if others or not gpu:
    return others
  return (
    'this machine has an NVIDIA GPU that JAX does not see: pip install '
    f'"jax[cuda12]=={jaxlib}", or cuda13, whichever the driver has'
  )


def make_deterministic() -> None:
  """Has XLA compile programs for GPUs without atomics in an unknown order.

  Raises:
    ValueError: JAX has started its backend, and with it read XLA_FLAGS.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if DETERMINISTIC in flags.split():
    return
  if backends_are_initialized():
    raise ValueError(
      'config.deterministic: expected to be set before JAX starts its devices; '
      f'start the process with XLA_FLAGS={DETERMINISTIC}'
    )
  os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC}'.strip()
