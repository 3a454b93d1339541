"""What the bits of a run depend on besides its config and its data."""

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

# In /proc/cpuinfo: of x86, and of ARM.
_ABOUT_CPU = (
  'model name',
  'cpu family',
  'model',
  'CPU implementer',
  'CPU part',
)


def describe() -> dict[str, Any]:
  """Devices, their kind, and the versions of jax, as plain JSON values."""
  kind = jax.devices()[0].device_kind
  found = {
    'devices': jax.device_count(),
    'kind': kind,
    'jax': jax.__version__,
    'jaxlib': jaxlib.version.__version__,
  }
  # JAX calls every CPU 'cpu', and XLA compiles for the one that is there.
  return found | {'cpu': _cpu_model()} if kind == 'cpu' else found


def _cpu_model() -> str:
  """What the system says of the processor."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  # Those of the last core; the name alone is often that of a whole family.
  about = dict(
    [part.strip() for part in x.split(':', 1)] for x in lines if ':' in x
  )
  known = [f'{name} {about[name]}' for name in _ABOUT_CPU if name in about]
  return ', '.join(known) or platform.processor() or platform.machine()


def check_machine(old: Mapping[str, Any], *, exact: bool) -> None:
  """Says it, or refuses, where a run goes on on another machine.

  The state comes back to the bit, and so does the order of the images,
  everywhere. But another number of devices sums in another order, and another
  device, processor or version computes otherwise: the steps that follow agree
  with those of the old machine up to rounding only.

  Args:
    old: from `describe`, when the checkpoint was made; what it does not name is
      not compared.
    exact: refuse.

  Raises:
    ValueError: exact, and something differs.
  """
  new = describe()
  differ = [
    f'{name}: checkpoint {old[name]}, now {new[name]}'
    for name in new
    if name in old and old[name] != new[name]
  ]
  if not differ:
    return
  what = '; '.join(differ)
  if exact:
    raise ValueError(
      f'the checkpoint was made on another machine ({what}), where the steps '
      'that follow would differ in their last bits; go on there, or allow it '
      'with --config.exact_resume=False'
    )
  logging.warning(
    'another machine than before (%s): the state is restored to the bit, the '
    'steps that follow are the same up to rounding',
    what,
  )
