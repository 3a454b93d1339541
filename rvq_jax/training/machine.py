"""What the bits of a run depend on besides its config and its data."""

import logging
from collections.abc import Mapping
from typing import Any

import jax


def describe() -> dict[str, Any]:
  """Devices, their kind and the version of jax, as plain JSON values."""
  return {
    'devices': jax.device_count(),
    'kind': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }


def check_machine(old: Mapping[str, Any], *, exact: bool) -> None:
  """Says it, or refuses, where a run goes on on another machine.

  The state comes back to the bit, and so does the order of the images,
  everywhere. But another number of devices sums in another order, and another
  device or version of jax computes otherwise: the steps that follow agree with
  those of the old machine up to rounding only.

  Args:
    old: from `describe`, when the checkpoint was made.
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
