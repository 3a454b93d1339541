"""Process-wide settings, applied before JAX starts its backend."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import logging
import mmap
import os
import platform
import re
from pathlib import Path

import jax
import jaxlib

# Private: every public question about JAX's backends starts one, and no public
# function drops an entry of its cache.
from jax._src import compilation_cache
from jax._src.xla_bridge import backends_are_initialized

from rvq_jax.io import cache_folder

DETERMINISTIC = '--xla_gpu_deterministic_ops=true'
# With Triton, XLA may find no deterministic tiling for a product and fail.
NO_TRITON = '--xla_gpu_enable_triton_gemm=false'


def prepare_backend(*, share_gpus: bool = False) -> None:
  """Caches compiled programs, keeps freed memory, warns of an unused GPU.

  The user's settings win. The cache has a folder per kind of CPU, because
  machines may share a home directory. Memory that glibc returned to the kernel
  would cost a third of a step in page faults, and YNNPACK's convolutions, XLA's
  default, another third (docs/scale.md). With `share_gpus`, JAX takes GPU
  memory as needed and leaves some to PyTorch in the same process.
  """
  if share_gpus:
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  compiled = cache_folder('compiled')
  if not jax.config.jax_compilation_cache_dir and compiled.is_absolute():
    folder = compiled / _kind_of_cpu()
    jax.config.update('jax_compilation_cache_dir', str(folder))
    _replace_damaged(folder)
  option = 'xla_cpu_experimental_ynn_fusion_type'
  flags = os.environ.get('XLA_FLAGS', '')
  if option not in flags and _is_known(option):
    os.environ['XLA_FLAGS'] = f'{flags} --{option}=-individual_convolution'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  on_cpu = (jax.config.jax_platforms or ('' if plugins else 'cpu')) == 'cpu'
  chosen = re.search('MALLOC_|GLIBC_TUNABLES', ' '.join(os.environ))
  if on_cpu and not chosen and platform.libc_ver()[0] == 'glibc':
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX. One arena, because an arena per
    # thread cannot grow beyond 64 MiB.
    for option in ((-4, 0), (-1, -1), (-8, 1)):
      ctypes.CDLL(None).mallopt(*option)
  gpu = any(Path('/proc/driver/nvidia/gpus').glob('*'))
  if not jax.config.jax_platforms and (advice := gpu_advice(gpu)):
    logging.warning('%s', advice)


def _replace_damaged(folder: Path) -> None:
  """Lets JAX recompile unreadable entries of the cache, as after a kill.

  JAX by default keeps such an entry and warns in every run.
  """
  read = compilation_cache.get_executable_and_time

  def read_or_drop(key, *arguments, **options):
    try:
      return read(key, *arguments, **options)
    except Exception:  # a dozen types, from zlib, zstandard, the compiler
      with contextlib.suppress(OSError):
        (folder / f'{key}-cache').unlink()
      return None, None

  compilation_cache.get_executable_and_time = read_or_drop


def _is_known(flag: str) -> bool:
  """Whether jaxlib has a flag of XLA; unknown flags end the process."""
  for path in Path(jaxlib.__file__).parent.glob('libjax_common.*'):
    with (
      path.open('rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
      return library.find(flag.encode()) >= 0
  return False


def _kind_of_cpu() -> str:
  info = Path('/proc/cpuinfo')
  text = info.read_text() if info.exists() else ''
  flags = re.search(r'^flags.*|\Z', text, re.M)[0].encode()
  return f'{platform.machine()}-{hashlib.sha256(flags).hexdigest()[:8]}'


def gpu_advice(gpu: bool) -> str:
  """Tells what to install if JAX cannot use the NVIDIA `gpu`; else ''.

  JAX ignores a plugin whose version differs from jaxlib's and uses the CPU.
  """
  jaxlib, mismatch = importlib.metadata.version('jaxlib'), ''
  for cuda in ('cuda12', 'cuda13'):
    try:
      plugin = importlib.metadata.version(f'jax-{cuda}-plugin')
    except importlib.metadata.PackageNotFoundError:
      continue
    if plugin == jaxlib:
      return ''
    mismatch = (
      f'jax-{cuda}-plugin {plugin} does not fit jaxlib {jaxlib}, so JAX sees '
      f'no GPU: pip install "jax[{cuda}]=={jaxlib}"'
    )
  if mismatch or not gpu:
    return mismatch
  return (
    'JAX does not see the NVIDIA GPU of this machine: pip install '
    f'"jax[cuda12]=={jaxlib}" or jax[cuda13], as the driver supports'
  )


def make_deterministic() -> None:
  """Lets XLA use no atomics on GPUs, which add in an unknown order.

  The user's flags stay; if they hold `DETERMINISTIC`, it adds none.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if DETERMINISTIC in flags.split():
    return
  if backends_are_initialized():
    raise ValueError(
      'config.deterministic: JAX has started its devices, too early to set '
      f'it: start the process with XLA_FLAGS="{DETERMINISTIC} {NO_TRITON}"'
    )
  # XLA takes the last value of an option.
  os.environ['XLA_FLAGS'] = f'{NO_TRITON} {flags} {DETERMINISTIC}'
