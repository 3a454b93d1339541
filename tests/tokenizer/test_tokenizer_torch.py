"""The PyTorch file of an export against our tokenizer."""

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rvq_jax import Tokenizer, load
from rvq_jax.quantize.registry import QUANTIZERS
from rvq_jax.tokenizer import export
from rvq_jax.tokenizer.export import write_export
from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_model

pytestmark = pytest.mark.usefixtures('one_device')

torch = pytest.importorskip('torch', reason='no torch: pip install torch')
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
MODELS = [{'quantizer': name} for name in QUANTIZERS]
MODELS += [
  {'cosine': True, 'factor': 8},  # one more stage than widths
  {'ema': False, 'cosine': True, 'codebook_size': 40},
  {'quantizer': 'residual', 'ema': False, 'depth': 3},
  {'quantizer': 'product', 'cosine': True, 'heads': 4},
  {'quantizer': 'fsq', 'codebook_size': 16},
  {'quantizer': 'simvq', 'cosine': True},
  {'norm': 'group', 'activation': 'swish', 'factor': 2},  # a stage of stride 1
]


@pytest.fixture(scope='module')
def source():
  """The module whose copy is in an export."""
  spec = importlib.util.spec_from_file_location(
    'tokenizer_torch', Path(export.__file__).with_name('tokenizer_torch.py')
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def real(source, shared_export):
  """The export of a run: our tokenizer, and PyTorch's."""
  return load(shared_export), source.Tokenizer.from_pretrained(shared_export)


def random_tokenizer(config, **changed):
  """An untrained model, none of whose arrays is 0 or 1 throughout."""
  config.model.update(num_res_blocks=1, widths=(4, 8), code_dim=8, num_heads=2)
  config.model.update(codebook_size=64)
  config.model.update(changed)
  flat = config_lib.check_config(config)
  model = build_model(flat)
  images = jnp.zeros((1, 16, 16, 3))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
  rng, arrays = np.random.default_rng(0), {}
  for name, shape in flatten_dict(dict(shapes), sep='.').items():
    x = rng.standard_normal(shape.shape)
    if name.endswith(('scale', 'var')):
      x = 1 + 0.3 * np.abs(x)
    elif name.endswith('kernel'):
      x *= 1.5 / np.sqrt(np.prod(shape.shape[:-1]))
    elif name.endswith('bias'):
      x *= 0.1
    arrays[name] = jnp.asarray(x, shape.dtype)
  variables = {'batch_stats': {}, 'codebook': {}}
  variables |= unflatten_dict(arrays, sep='.')
  return Tokenizer(model, variables, config=flat, step=1)


def check_same(ours, theirs, images):
  """Same ids for 99.99 % of the tokens, same pictures of our ids to 1e-4."""
  ids = np.array(ours.encode(images))
  got = theirs.encode(images)
  assert got.dtype == torch.int64 and got.shape == ids.shape
  assert np.mean(got.numpy() == ids) >= 0.9999
  assert len(np.unique(ids)) > 1
  pictures = theirs.decode(ids)
  assert pictures.dtype == torch.float32
  np.testing.assert_allclose(pictures.numpy(), ours.decode(ids), atol=1e-4)


@pytest.mark.parametrize(
  'changed', MODELS, ids=lambda x: '-'.join(map(str, x.values()))
)
def test_a_model_gives_our_ids_and_our_pictures(
  changed, source, tiny_config, test_images, tmp_path
):
  ours = random_tokenizer(tiny_config, **changed)
  write_export(tmp_path, ours)
  theirs = source.Tokenizer.from_pretrained(tmp_path)
  check_same(ours, theirs, test_images)
  for name in ('codebook_size', 'factor', 'codes_per_position', 'model_hash'):
    assert getattr(theirs, name) == getattr(ours, name), name


def test_a_run_gives_our_ids_and_our_pictures(real, test_images):
  check_same(*real, test_images)


def test_sides_need_not_be_those_of_the_training(real, test_images):
  check_same(*real, test_images[:, :12, :8])


def test_codes_far_from_the_origin_are_told_apart(source):
  rng = np.random.default_rng(0)
  codes = 1e3 + 0.1 * rng.standard_normal((50, 8)).astype(np.float32)
  e = np.repeat(codes, 20, 0) + np.float32(0.01)
  ids = source.nearest(torch.tensor(e), torch.tensor(codes))
  distance = ((e[:, None].astype(float) - codes[None]) ** 2).sum(-1)
  np.testing.assert_array_equal(ids.numpy(), distance.argmin(1))


@pytest.mark.parametrize(
  ('changed', 'count'),
  [
    ({'quantizer': 'residual', 'depth': 3}, 2),
    ({'quantizer': 'multiscale', 'sides': (1, 3, 4)}, 10),
  ],
  ids=str,
)
def test_the_first_codes_of_a_tokenizer_decode(
  changed, count, source, tiny_config, test_images, tmp_path
):
  ours = random_tokenizer(tiny_config, **changed)
  write_export(tmp_path, ours)
  ids = np.array(ours.encode(test_images))[..., :count]
  theirs = source.Tokenizer.from_pretrained(tmp_path)
  want = ours.decode(ids)
  np.testing.assert_allclose(theirs.decode(ids).numpy(), want, atol=1e-4)


def test_both_layouts_and_both_dtypes_are_taken(real, test_images):
  _, tokenizer = real
  images = torch.tensor(test_images)
  ids = tokenizer.encode(images)
  floats = (images.double() / 127.5 - 1).permute(0, 3, 1, 2)
  assert torch.equal(tokenizer.encode(floats), ids)
  # As files of tokens hold them.
  pictures = tokenizer.decode(ids.numpy().astype(np.uint16))
  assert pictures.shape == images.shape
  first = tokenizer.decode(ids.int(), channels_first=True)
  assert torch.equal(first.permute(0, 2, 3, 1), pictures)


ONE = np.zeros((1, 4, 4), int)
SCALES = np.zeros((1, 9), int)


@pytest.mark.parametrize(
  ('quantizer', 'call', 'given', 'message'),
  [
    ('vq', 'encode', np.zeros((16, 16, 3)), r'multiples of 4.*\[16, 16, 3\]'),
    ('vq', 'encode', np.zeros((1, 16, 18, 3)), r'got \[1, 16, 18, 3\]'),
    ('vq', 'encode', np.zeros((1, 16, 16, 4)), r'got \[1, 16, 16, 4\]'),
    ('vq', 'encode', np.zeros((0, 16, 16, 3)), r'got \[0, 16, 16, 3\]'),
    (
      'vq',
      'encode',
      np.zeros((1, 16, 16, 3), np.int32),
      'float .* torch.int32',
    ),
    ('vq', 'encode', np.full((1, 16, 16, 3), 255.0), 'float64 from 255 to 255'),
    ('vq', 'encode', np.full((1, 16, 16, 3), np.nan), 'float64 from nan'),
    (
      'multiscale',
      'encode',
      np.zeros((1, 12, 16, 3)),
      'whose sides are 16, got',
    ),
    (
      'vq',
      'decode',
      ONE[0],
      r'expected ids \[B, H, W\], .*torch.int64 \[4, 4\]',
    ),
    ('vq', 'decode', ONE / 1, 'got torch.float64'),
    ('vq', 'decode', ONE[..., None], r'got torch.int64 \[1, 4, 4, 1\]'),
    ('vq', 'decode', ONE + 64, 'from 0 to 63, got 64 to 64'),
    ('vq', 'decode', ONE - 1, 'from 0 to 63, got -1 to -1'),
    (
      'residual',
      'decode',
      ONE[..., None].repeat(5, -1),
      r'L in \[1, 2, 3, 4\]',
    ),
    ('product', 'decode', ONE[..., None], r'\[B, H, W, L\] with L in \[2\]'),
    ('multiscale', 'decode', SCALES, r'T in \[1, 10, 26\], .* \[1, 9\]'),
  ],
)
def test_other_images_and_ids_are_refused_in_one_line(
  quantizer, call, given, message, source, tiny_config, tmp_path
):
  write_export(tmp_path, random_tokenizer(tiny_config, quantizer=quantizer))
  tokenizer = source.Tokenizer.from_pretrained(tmp_path)
  with pytest.raises(ValueError, match=message) as caught:
    getattr(tokenizer, call)(torch.as_tensor(given))
  assert '\n' not in str(caught.value)


def remove(name):
  return lambda folder: (folder / name).unlink()


def rewrite(name, change):
  def apply(folder):
    (folder / name).write_bytes(change((folder / name).read_bytes()))

  return apply


def rewrite_entry(**changed):
  """Changes fields of the entry torch of config.json, or removes it."""

  def change(data):
    about = json.loads(data)
    entry = about.pop('torch') | changed
    about |= {'torch': entry} if changed else {}
    return json.dumps(about).encode()

  return rewrite(CONFIG, change)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (shutil.rmtree, 'expected a folder of launch/export.py'),
    (remove(CONFIG), 'No such file.*config.json'),
    (remove(WEIGHTS), 'got FileNotFoundError'),
    (rewrite(CONFIG, lambda _: b'{'), 'got JSONDecodeError'),
    (rewrite(CONFIG, lambda _: b'[]'), 'got TypeError'),
    (rewrite(CONFIG, lambda _: b'{}'), "KeyError: 'format_version'"),
    (rewrite_entry(), "KeyError: 'torch'; .*, use tokenizer_torch.py in it"),
    (rewrite_entry(quantizer='new'), "KeyError: 'new'; if another version"),
    (rewrite_entry(activation='relu'), "KeyError: 'relu'"),
    (rewrite_entry(architecture='{"factor": 2}'), 'of another hash'),
    (rewrite(WEIGHTS, lambda x: x[:-1]), 'got SafetensorError'),
    (
      rewrite(WEIGHTS, lambda x: x[:-1] + bytes([x[-1] ^ 1])),
      'model.safetensors of another hash than config.json says',
    ),
    (rewrite(WEIGHTS, lambda x: x.replace(b'conv0', b'conv9')), 'another hash'),
  ],
)
def test_a_damaged_folder_is_refused_in_one_line(
  damage, message, source, exported
):
  damage(exported)
  with pytest.raises((ValueError, OSError), match=message) as caught:
    source.Tokenizer.from_pretrained(exported)
  assert '\n' not in str(caught.value) and str(exported) in str(caught.value)


def test_a_model_of_the_hub_is_downloaded(source, exported, monkeypatch):
  asked = []

  def snapshot_download(repo, **options):
    asked.append((repo, options['revision'], set(options['allow_patterns'])))
    return str(exported)

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  files = {'model.safetensors', 'config.json'}
  for name, revision in (('a/b', None), ('hf:a/b@v1', 'v1')):
    assert source.Tokenizer.from_pretrained(name).factor == 4
    assert asked.pop() == ('a/b', revision, files)


def test_a_name_that_nobody_knows_is_one_line(source, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # not installed
  with pytest.raises(ValueError, match='no/such: .*Hub, got .*huggingface_hub'):
    source.Tokenizer.from_pretrained('no/such')


PROGRAM = """
import sys
for name in ('rvq_jax', 'jax', 'flax', 'huggingface_hub'):
  sys.modules[name] = None
import numpy as np
import torch
from tokenizer_torch import Tokenizer
images = torch.tensor(np.load('images.npy'))
tokenizer = Tokenizer.from_pretrained('.')
print(tokenizer.encode(images).flatten().tolist())
"""


def test_the_folder_alone_is_enough(exported, test_images):
  np.save(exported / 'images.npy', test_images[:2])
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', PROGRAM],
    cwd=exported,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  ids = np.array(load(exported).encode(test_images[:2]))
  assert json.loads(done.stdout) == ids.flatten().tolist()
