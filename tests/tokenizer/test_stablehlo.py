"""encode and decode as StableHLO, run where rvq_jax cannot be imported."""

import jax.export
import numpy as np
import pytest

from rvq_jax.tokenizer.stablehlo import PLATFORMS, write_stablehlo

pytestmark = pytest.mark.usefixtures('one_device')

pytest.importorskip('flatbuffers', reason='pip install "rvq_jax[stablehlo]"')
PROGRAM = """
import os
import sys
for name in ('rvq_jax', 'flax', 'safetensors'):
  sys.modules[name] = None
os.chdir(FOLDER)
import numpy as np
from jax import export

def read(name):
  with open(name, 'rb') as file:
    return export.deserialize(bytearray(file.read())).call

images = np.load('images.npy')
encode, decode = read('encode_cpu.stablehlo'), read('decode_cpu.stablehlo')
ids = encode(images)
np.savez('out.npz', ids=ids, one=encode(images[:1]), decoded=decode(ids))
"""


@pytest.fixture(scope='module')
def folder(make_tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('stablehlo')
  write_stablehlo(path, make_tokenizer())
  return path


def test_ids_and_pictures_are_ours_without_our_package(
  folder, make_tokenizer, test_images, run_python
):
  tokenizer = make_tokenizer()
  np.save(folder / 'images.npy', test_images)
  done = run_python(PROGRAM.replace('FOLDER', repr(str(folder))))
  assert done.returncode == 0, done.stderr
  ids = np.asarray(tokenizer.encode(test_images))
  with np.load(folder / 'out.npz') as out:
    assert out['ids'].dtype == np.int32
    np.testing.assert_array_equal(out['ids'], ids)
    np.testing.assert_array_equal(out['one'], ids[:1])
    ours = tokenizer.decode(ids)
    np.testing.assert_allclose(out['decoded'], ours, atol=1e-6)


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ImportError, match='extra stablehlo: pip install flat'):
    write_stablehlo(tmp_path, None)


@pytest.mark.parametrize('platform', PLATFORMS)
def test_a_file_is_of_one_platform_and_any_number_of_images(platform, folder):
  for name, shape, dtype in (
    ('encode', '(b, 16, 16, 3)', 'uint8'),
    ('decode', '(b, 4, 4)', 'int32'),
  ):
    data = (folder / f'{name}_{platform}.stablehlo').read_bytes()
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == (platform,)
    (given,) = exported.in_avals
    assert (str(given.shape), given.dtype) == (shape, dtype)
