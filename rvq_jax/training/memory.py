"""How much memory there is, before something is asked for that has no end."""

import os

import jax


def device_memory() -> int | None:
  """Bytes of memory for one device's share of the work; None if not known.

  CPU devices share the memory of the machine.
  """
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return total // jax.local_device_count()
  return (device.memory_stats() or {}).get('bytes_limit')


def check_state(needed: int) -> None:
  """Refuses a model that cannot fit, whatever the batch.

  Args:
    needed: bytes of the training state and of the gradients.

  Raises:
    ValueError: a device has less.
  """
  there = device_memory()
  if there is not None and needed > there:
    raise ValueError(
      f'the training state of this model takes {needed / 1e9:,.1f} GB on each '
      f'device, which has {there / 1e9:,.1f} GB; lower model.codebook_size, '
      'model.code_dim, model.widths or model.num_res_blocks'
    )
