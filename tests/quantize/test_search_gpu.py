"""The kernel in interpret mode on CPU, and its lowering for CUDA."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from rvq_jax.quantize import search_gpu
from rvq_jax.quantize.search import nearest_codes

# jax 0.11 still lowers by Triton but warns that it will stop to.
pytestmark = pytest.mark.filterwarnings(
  'ignore:The Pallas Triton backend:DeprecationWarning'
)

find = functools.partial(nearest_codes, implementation='pallas')


def brute_force(e, codes):
  """argmin_k sum((e - c_k)^2) in float64; NumPy takes the lowest index."""
  e, codes = np.float64(e), np.float64(codes)
  return np.array([np.argmin(((row - codes) ** 2).sum(1)) for row in e])


def draw(n, k, dim):
  rng = np.random.default_rng(0)
  e = rng.standard_normal((n, dim), np.float32)
  return e, rng.standard_normal((k, dim), np.float32)


@pytest.mark.parametrize(
  'n,k,dim', [(1, 1, 1), (130, 300, 40), (17, 129, 3), (300, 5, 64)]
)
def test_ids_equal_brute_force(n, k, dim):
  e, codes = draw(n, k, dim)
  np.testing.assert_array_equal(find(e, codes), brute_force(e, codes))


@pytest.mark.parametrize('programs', [1, 2, 264])
def test_split_codes_give_the_same_ids(programs, monkeypatch):
  monkeypatch.setattr(search_gpu, 'PROGRAMS', programs)
  e, codes = draw(40, 700, 8)
  bias = -0.5 * np.sum(codes**2, axis=1)
  ids = search_gpu.fused_argmax(e, codes, bias)
  np.testing.assert_array_equal(ids, brute_force(e, codes))


def test_ties_across_tiles_and_programs_go_to_the_lowest_index():
  e, codes = draw(50, 90, 5)
  copies = np.concatenate([codes] * 5)
  np.testing.assert_array_equal(find(e, copies), brute_force(e, codes))


@pytest.mark.parametrize('scale', [1e-12, 1e6, 1e19])
def test_scale_of_the_vectors_does_not_matter(scale):
  e, codes = (np.float32(x * scale) for x in draw(30, 140, 8))
  np.testing.assert_array_equal(find(e, codes), brute_force(e, codes))


def test_non_finite_rows_and_codes_spoil_no_other():
  e, codes = draw(40, 140, 5)
  expected = brute_force(e, codes[1:]) + 1
  codes[0], e[3], e[5, 2] = np.nan, np.nan, np.inf
  ids = np.asarray(find(e, codes))
  assert ids.min() >= 0 and ids.max() < 140
  others = np.delete(np.arange(40), [3, 5])
  np.testing.assert_array_equal(ids[others], expected[others])


def test_only_non_finite_codes_give_id_zero():
  ids = find(np.ones((4, 2)), np.full((300, 2), np.nan))
  np.testing.assert_array_equal(ids, np.zeros(4))


def test_vmap_gives_the_same_ids():
  e, codes = draw(60, 140, 6)
  ids = jax.vmap(find, (0, None))(e.reshape(3, 20, 6), codes)
  np.testing.assert_array_equal(ids.reshape(-1), brute_force(e, codes))


def lowered_for_cuda(n, k, dim, precision=None):
  kernel = functools.partial(
    search_gpu.fused_argmax, precision=precision, interpret=False
  )
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  device = AbstractDevice(
    device_kind='NVIDIA H100', num_cores=132, platform='gpu'
  )
  mesh = AbstractMesh((), (), abstract_device=device)
  with use_abstract_mesh(mesh):  # jax 0.11 asks for the device it lowers for
    args = shape((n, dim)), shape((k, dim)), shape((k,))
    lowered = jax.jit(kernel).trace(*args).lower(lowering_platforms=('cuda',))
    return lowered.as_text()


@pytest.mark.parametrize('precision', [None, 'highest'])
@pytest.mark.parametrize('n,k,dim', [(1, 1, 1), (2049, 1000, 48)])
def test_kernel_lowers_for_cuda_by_triton(n, k, dim, precision):
  text = lowered_for_cuda(n, k, dim, precision)
  assert 'nearest_codes' in text and 'triton' in text


def test_no_score_leaves_the_kernel():
  text = lowered_for_cuda(131072, 16384, 256)
  shapes = re.findall(r'tensor<((?:\d+x)+)', text)
  sizes = [math.prod(map(int, shape[:-1].split('x'))) for shape in shapes]
  assert max(sizes) == 131072 * 256
