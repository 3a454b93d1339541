"""The batch is split over all devices, everything else replicated.

A codebook that is split over the devices of a second axis 'codes' is the
exception; see `rvq_jax.quantize.sharded`.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices=None, *, codebook_shards: int = 1) -> Mesh:
  """A mesh over devices.

  Args:
    devices: default: all.
    codebook_shards: devices that share a codebook; they are neighbours.

  Returns:
    A mesh with the axis 'data', and 'codes' where a codebook is shared.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  axes = ('data',)
  if codebook_shards > 1:
    axes = ('data', 'codes')
    devices = devices.reshape(-1, codebook_shards)
  return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of state: a full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
  """Sharding of a batch: one axis, the first, split over the devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def of_state(state, mesh: Mesh):
  """The shardings of a `TrainState`, or of the shapes of one."""
  shardings = jax.tree.map(lambda _: replicated(mesh), state)
  if 'codes' not in mesh.axis_names:
    return shardings
  by_codes = NamedSharding(mesh, PartitionSpec('codes'))
  return shardings.replace(
    codebook=jax.tree.map(lambda _: by_codes, state.codebook)
  )


def shard_batch(batch, mesh: Mesh, *, axis: int = 0):
  """Puts this process's share of a batch onto its devices.

  Args:
    batch: tree of arrays [B / processes, ...] on the host.
    mesh: from `data_mesh`.
    axis: that of the images, where another one is in front.

  Returns:
    The tree of global arrays [B, ...].
  """
  sharding = by_rows(mesh, axis=axis)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def replicate(tree, mesh: Mesh):
  """Copies arrays that every process holds onto all devices of the mesh."""
  everywhere = replicated(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)),
    tree,
  )
