"""A codebook too large for one device: split over the codes.

Each device along the mesh axis 'codes' holds K/n codes and their averages. The
devices of one such group show each other their vectors, [N, D] of the group,
and each searches, counts and sums for the codes that it holds; what it finds is
compared by a maximum and then the lowest index, as one device would. Between
groups (axis 'data') the counts and sums of a share are added up. No device ever
holds K x D numbers.

The functions take global arrays under `jit`: codes split over 'codes', rows
over both axes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rvq_jax.quantize import codebook as cb
from rvq_jax.quantize import replacement, search

CODES, DATA = 'codes', 'data'
ROWS = (DATA, CODES)
_BY_ROWS, _BY_CODES = P(ROWS), P(CODES)


def _mapped(mesh, function, in_specs, out_specs):
  return jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=out_specs
  )


def _padded(mesh, *arrays):
  """Arrays [N, ...] with rows that the devices divide; those added are 0."""
  more = -len(arrays[0]) % mesh.size
  return [jnp.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1)) for x in arrays]


def _gather(x):
  """The rows of the whole group."""
  return jax.lax.all_gather(x, CODES, tiled=True)


def _own(x):
  """This device's rows of those of the group."""
  n = len(x) // jax.lax.axis_size(CODES)
  return jax.lax.dynamic_slice_in_dim(x, n * jax.lax.axis_index(CODES), n)


def _local(ids, share: int):
  """ids as indices into this device's share, and which of them are in it."""
  local = ids - share * jax.lax.axis_index(CODES)
  here = (local >= 0) & (local < share)
  return jnp.clip(local, 0, share - 1), here


def _look_up(embedding, ids):
  """The codes [n, D] of this device's rows, by the ids [N] of the group's."""
  local, here = _local(ids, len(embedding))
  codes = jnp.where(here[:, None], embedding[local], 0.0)
  return jax.lax.psum_scatter(codes, CODES, tiled=True)


def _frame(embedding):
  """`search.frame` of the whole codebook."""
  share = len(embedding)
  _, peak = search.frame_inputs(embedding)
  sampled = search.sampled_codes(share * jax.lax.axis_size(CODES))
  local, here = _local(jnp.asarray(sampled), share)
  sample = jnp.where(here[:, None], embedding[local], 0.0)
  return search.frame(jax.lax.psum(sample, CODES), jax.lax.pmax(peak, CODES))


def find(
  mesh, e: jax.Array, embedding: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Nearest codes, as `nearest_codes`, and the codes themselves.

  Args:
    mesh: with the axes 'data' and 'codes'.
    e: vectors [N, D], float32.
    embedding: codes [K, D], float32; n divides K.

  Returns:
    ids [N], int32, and codes [N, D]; neither carries a gradient.
  """

  def find(e, embedding):
    rows = _gather(e)
    score, ids = search.best_codes(rows, embedding, *_frame(embedding))
    best = jax.lax.pmax(score, CODES)
    ids += len(embedding) * jax.lax.axis_index(CODES)
    last = jnp.iinfo(jnp.int32).max
    ids = jax.lax.pmin(jnp.where(score == best, ids, last), CODES)
    return _own(ids), _look_up(embedding, ids)

  n = len(e)
  e, embedding = jax.lax.stop_gradient((e, embedding))
  (e,) = _padded(mesh, e)
  specs = (_BY_ROWS, _BY_CODES)
  ids, q = _mapped(mesh, find, specs, (_BY_ROWS, _BY_ROWS))(e, embedding)
  return ids[:n], q[:n]


def ema_update(
  mesh, codebook: cb.Codebook, e, ids, *, decay: float, eps: float, mask
) -> cb.Codebook:
  """`codebook.ema_update`; mask [N] says which rows count."""

  def update(codebook, e, ids, mask):
    e, ids, mask = map(_gather, (e, ids, mask))
    local, here = _local(ids, len(codebook.cluster_size))
    return cb.ema_update(
      codebook,
      e,
      local,
      decay=decay,
      eps=eps,
      axis_name=DATA,
      mask=mask & here,
      codes_axis=CODES,
    )

  specs = (_BY_CODES,) + (_BY_ROWS,) * 3
  rows = _padded(mesh, e, ids, mask)
  return _mapped(mesh, update, specs, _BY_CODES)(codebook, *rows)


def fill_codebook(
  mesh, codebook: cb.Codebook, key, e, *, expected_size, mask
) -> cb.Codebook:
  """`replacement.fill_codebook`."""

  def fill(codebook, key, e, mask, size):
    dead = jnp.ones(len(codebook.cluster_size), bool)
    return _place(codebook, dead, key, e, None, mask, size)[0]

  specs = (_BY_CODES, P(), _BY_ROWS, _BY_ROWS, P())
  e, mask = _padded(mesh, e, mask)
  return _mapped(mesh, fill, specs, _BY_CODES)(
    codebook, key, e, mask, expected_size
  )


def replace_codes(
  mesh,
  codebook: cb.Codebook,
  dead,
  key,
  e,
  ids,
  *,
  expected_size,
  step: float,
  mask,
) -> tuple[cb.Codebook, jax.Array]:
  """`replacement.replace_codes`."""

  def replace(codebook, dead, key, e, ids, mask, size):
    parent = _look_up(codebook.embedding, _gather(ids))
    weight = _gather(codebook.cluster_size)[ids]
    rows = parent + step * (e - parent)
    return _place(codebook, dead, key, rows, weight, mask, size)

  specs = (_BY_CODES, _BY_CODES, P(), _BY_ROWS, _BY_ROWS, _BY_ROWS, P())
  e, ids, mask = _padded(mesh, e, ids, mask)
  return _mapped(mesh, replace, specs, (_BY_CODES, P()))(
    codebook, dead, key, e, ids, mask, expected_size
  )


def _place(codebook, dead, key, rows, weight, mask, size):
  """Puts this device's dead codes onto rows drawn from the global batch."""
  share = len(codebook.cluster_size)
  total = share * jax.lax.axis_size(CODES)
  places, usable = replacement.draw_places(
    key,
    rows,
    min(total, len(rows) * jax.lax.axis_size(ROWS)),
    weight=weight,
    axis_name=ROWS,
    mask=mask,
  )
  source, placed = replacement.assign(
    _gather(codebook.cluster_size), _gather(dead), usable
  )
  mine = functools.partial(
    jax.lax.dynamic_slice_in_dim,
    start_index=share * jax.lax.axis_index(CODES),
    slice_size=share,
  )
  source, placed = mine(source), mine(placed)
  wanted = replacement.fetch_rows(_gather(rows), places[source], placed, DATA)
  replaced = jax.lax.psum(jnp.sum(placed.astype(jnp.int32)), CODES)
  return replacement.put(codebook, placed, wanted, size), replaced
