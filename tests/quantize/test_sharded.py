"""A codebook split over devices moves and is searched as a whole one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rvq_jax import VectorQuantizer, nearest_codes
from rvq_jax.quantize import sharded
from rvq_jax.training import sharding

# devices in all, devices that share a codebook
MESHES = [(2, 2), (4, 2), (8, 8), (8, 4)]


def make_mesh(devices, shards):
  return sharding.data_mesh(
    jax.devices('cpu')[:devices], codebook_shards=shards
  )


def nearest_by_numpy(e, embedding):
  e, embedding = np.asarray(e, np.float64), np.asarray(embedding, np.float64)
  return ((e[:, None] - embedding[None]) ** 2).sum(-1).argmin(1)


def find(mesh, e, embedding):
  return jax.jit(functools.partial(sharded.find, mesh))(e, embedding)


@pytest.mark.parametrize(('devices', 'shards'), MESHES)
def test_the_nearest_code_is_found_wherever_it_is(devices, shards):
  rng = np.random.default_rng(0)
  e = rng.normal(size=(61, 5)).astype(np.float32) + 3
  embedding = rng.normal(size=(40, 5)).astype(np.float32) + 3
  ids, q = find(make_mesh(devices, shards), e, embedding)
  want = nearest_by_numpy(e, embedding)
  np.testing.assert_array_equal(ids, want)
  np.testing.assert_array_equal(q, embedding[want])
  assert len(set(want // (40 // shards))) == shards  # every share is chosen


@pytest.mark.parametrize(('devices', 'shards'), MESHES)
def test_a_tie_goes_to_the_lowest_index_of_all_devices(devices, shards):
  rng = np.random.default_rng(0)
  few = rng.integers(-2, 3, (10, 3)).astype(np.float32)
  embedding = np.concatenate([few, few, few, few])
  e = rng.integers(-2, 3, (64, 3)).astype(np.float32)
  ids, _ = find(make_mesh(devices, shards), e, embedding)
  assert ids.max() < 10
  np.testing.assert_array_equal(ids, nearest_by_numpy(e, embedding))


def test_a_code_that_is_not_finite_is_not_chosen():
  rng = np.random.default_rng(0)
  embedding = rng.normal(size=(16, 3)).astype(np.float32)
  embedding[[3, 9]] = np.nan
  e = rng.normal(size=(32, 3)).astype(np.float32)
  ids, q = find(make_mesh(4, 4), e, embedding)
  np.testing.assert_array_equal(ids, nearest_codes(e, jnp.asarray(embedding)))
  assert np.isfinite(q).all()


OPTIONS = {
  'plain': {},
  'cosine': {'cosine': True},
  'normal': {'init_from': 'normal'},
}


def layer(mesh=None, **options):
  return VectorQuantizer(
    codebook_size=64,
    decay=0.7,
    eps=0.3,
    dead_code_threshold=0.8,
    mesh=mesh,
    **options,
  )


def steps(mesh, options, count=3):
  """Output and collections after each of some training steps."""
  rng = np.random.default_rng(1)
  module = layer(mesh, **options)
  z = rng.normal(size=(count, 16, 6, 5)).astype(np.float32)
  z[:, 3, 2] = np.inf  # one vector that does not count
  state = layer(**options).init(jax.random.key(0), z[0])

  def loss(z, state, key):
    out, updates = module.apply(
      state, z, train=True, mutable=['codebook'], rngs={'codebook': key}
    )
    value = out.loss + jnp.sum(jnp.nan_to_num(out.quantized) ** 2)
    return value, (out.ids, out.counts, out.metrics, updates)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  if mesh is not None:
    place = NamedSharding(mesh, P('codes'))
    state = jax.device_put(state, jax.tree.map(lambda _: place, state))
  results = []
  for i in range(count):
    (_, (ids, counts, metrics, state)), grad = step(
      z[i], state, jax.random.key(i)
    )
    ids = ids.at[3, 2].set(0)  # it may be any
    results.append((ids, counts, metrics, state, grad))
  return jax.device_get(results)


@functools.cache
def replicated_steps(name):
  return steps(None, OPTIONS[name])


@pytest.mark.parametrize(
  ('name', 'devices', 'shards'),
  [
    ('plain', 8, 4),
    pytest.param('plain', 2, 2, marks=pytest.mark.slow),
    pytest.param('plain', 4, 4, marks=pytest.mark.slow),
    pytest.param('plain', 8, 8, marks=pytest.mark.slow),
    pytest.param('cosine', 4, 2, marks=pytest.mark.slow),
    pytest.param('normal', 4, 2, marks=pytest.mark.slow),
  ],
)
def test_training_is_that_of_a_codebook_in_one_piece(name, devices, shards):
  got = steps(make_mesh(devices, shards), OPTIONS[name])
  want = replicated_steps(name)
  assert want[-1][2]['replaced_codes'] > 0
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      x, y, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
    )


def test_learned_codes_are_refused():
  module = VectorQuantizer(codebook_size=8, ema=False, mesh=make_mesh(2, 2))
  with pytest.raises(ValueError, match='expected ema=True'):
    module.init(jax.random.key(0), jnp.zeros((4, 2)))


@pytest.mark.parametrize(('devices', 'shards'), [(4, 2), (8, 8)])
def test_no_device_holds_the_whole_codebook(devices, shards):
  size, dim = 4096, 24
  mesh = make_mesh(devices, shards)
  module = VectorQuantizer(codebook_size=size, mesh=mesh)
  by_codes = NamedSharding(mesh, P('codes'))
  by_rows = NamedSharding(mesh, P(mesh.axis_names))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  state = {
    'codebook': {
      'embedding': shape((size, dim)),
      'cluster_size': shape((size,)),
      'embedding_sum': shape((size, dim)),
    }
  }

  def step(state, z):
    out, updates = module.apply(state, z, train=True, mutable=['codebook'])
    return updates, out.quantized

  program = (
    jax.jit(
      step,
      in_shardings=(by_codes, by_rows),
      out_shardings=(by_codes, by_rows),
    )
    .lower(state, shape((256, dim)))
    .compile()
    .as_text()
  )
  shapes = {
    tuple(map(int, dims.split(',')))
    for dims in re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', program)
  }
  assert (size // shards, dim) in shapes  # what a device does hold
  whole = [s for s in shapes if size in s and dim in s]
  assert whole == []
