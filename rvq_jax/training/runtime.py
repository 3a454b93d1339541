"""What a training process sets up before JAX starts its backend."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import jax

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def prepare() -> None:
  """What every launcher calls first: see the two functions below."""
  cache_programs()
  keep_freed_memory()


def computes_on_cpu() -> bool:
  """Whether JAX will choose its CPU backend; does not start a backend."""
  platforms = jax.config.jax_platforms
  if platforms:
    return platforms == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not plugins and importlib.util.find_spec('libtpu') is None


def keep_freed_memory() -> bool:
  """Lets the C library keep the memory that a step frees for the next one.

  XLA:CPU asks for its temporaries (0.5 GiB for the paper's model at 32x32,
  batch 128) anew in each call. By default glibc takes such blocks from the
  kernel and gives them back, so that every step pays for each page again: 120
  thousand page faults a step there, 1.2 million at 256x256, batch 8, a third of
  either step (docs/scale.md). The process stays as large as its greatest step.

  Nothing is done with another C library, where the user has set malloc up
  (MALLOC_*, GLIBC_TUNABLES), or where an accelerator computes.

  Returns:
    Whether it was done.
  """
  chosen = [
    n for n in os.environ if n.startswith('MALLOC_') or n == 'GLIBC_TUNABLES'
  ]
  if chosen or platform.libc_ver()[0] != 'glibc' or not computes_on_cpu():
    return False
  libc = ctypes.CDLL(None)
  # One arena, because those of threads cannot grow beyond 64 MiB.
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
  return all(libc.mallopt(*setting) for setting in settings)


def cache_programs(directory=None) -> Path:
  """Keeps compiled programs on disk, so that the next start need not compile.

  JAX_COMPILATION_CACHE_DIR, where it is set, has the last word.

  Args:
    directory: default ~/.cache/rvq_jax/compiled (or under XDG_CACHE_HOME), in
      a folder of its own for each kind of CPU: what XLA compiles for one may
      not run on another that shares the home directory.

  Returns:
    The directory.
  """
  if jax.config.jax_compilation_cache_dir:
    return Path(jax.config.jax_compilation_cache_dir)
  if directory is None:
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    directory = Path(home) / 'rvq_jax' / 'compiled' / _cpu_kind()
  jax.config.update('jax_compilation_cache_dir', str(directory))
  return Path(directory)


def _cpu_kind() -> str:
  """The same text on machines whose CPUs take the same instructions."""
  features = platform.machine()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text().splitlines()
    features += next((x for x in lines if x.startswith('flags')), '')
  digest = hashlib.sha256(features.encode()).hexdigest()
  return f'{platform.machine()}-{digest[:8]}'
