"""Placement on devices: the batch is split by rows, the rest replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices=None) -> Mesh:
  """A mesh with the one axis 'data' over devices; default: all."""
  devices = np.asarray(jax.devices() if devices is None else devices)
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of state: a full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Sharding of a batch: the first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def shard_batch(batch, mesh: Mesh):
  """This process's [B / processes, ...] as shares of global arrays [B, ...]."""
  return _place(batch, by_rows(mesh))


def replicate(tree, mesh: Mesh):
  """Copies arrays that every process holds onto all devices of the mesh."""
  return _place(tree, replicated(mesh))


def _place(tree, sharding):
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )
