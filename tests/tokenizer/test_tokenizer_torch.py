"""The PyTorch file of an export against our tokenizer."""

import json
import shutil
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doc_blocks import ROOT, blocks
from errors import one_line
from flax.traverse_util import flatten_dict, unflatten_dict

from rvq_jax import Tokenizer, load
from rvq_jax.quantize.registry import QUANTIZERS
from rvq_jax.tokenizer.export import export_run, write_export
from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_model

pytestmark = pytest.mark.usefixtures('one_device')

torch = pytest.importorskip('torch', reason='no torch: pip install torch')
from rvq_jax.tokenizer.tokenizer_torch import Tokenizer as Torch  # noqa: E402
from rvq_jax.tokenizer.tokenizer_torch import nearest  # noqa: E402

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
MODELS = [{'quantizer': name} for name in QUANTIZERS]
MODELS += [
  {'cosine': True, 'factor': 8},  # one more stage than widths
  {'ema': False, 'cosine': True, 'codebook_size': 40},
  {'quantizer': 'residual', 'ema': False, 'depth': 3},
  {'quantizer': 'product', 'cosine': True, 'heads': 4},
  {'quantizer': 'fsq', 'codebook_size': 16},
  {'inner_product': True},
  {'quantizer': 'simvq', 'cosine': True},
  {'quantizer': 'multiscale', 'resize': 'torch'},
  {'quantizer': 'multiscale', 'resize': 'torch', 'sides': (1, 2, 3, 4)},
  {'norm': 'group', 'activation': 'swish', 'factor': 2},  # a stage of stride 1
  {'norm': 'group_blocks'},
]


@pytest.fixture(scope='module')
def real(shared_export):
  """The export of a run: our tokenizer, and PyTorch's."""
  return load(shared_export), Torch.from_pretrained(shared_export)


@pytest.fixture
def open_torch(tiny_config, tmp_path):
  """Returns a function of model fields: our tokenizer, and PyTorch's.

  It is untrained; none of its arrays is 0 or 1 throughout.
  """

  def make(**changed):
    sizes = {'num_res_blocks': 1, 'code_dim': 8, 'codebook_size': 64}
    tiny_config.model.update(sizes | changed)
    tiny_config.freeze = 'codes'  # else no inner_product
    flat = config_lib.check_config(tiny_config)
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
    ours = Tokenizer(model, variables, config=flat, step=1)
    write_export(tmp_path, ours)
    return ours, Torch.from_pretrained(tmp_path)

  return make


def check_same(ours, theirs, images):
  """Same ids for 99.99 % of the tokens, same pictures to 1e-4 of any prefix."""
  ids = np.array(ours.encode(images))
  got = theirs.encode(images)
  assert got.dtype == torch.int64 and got.shape == ids.shape
  assert np.mean(got.numpy() == ids) >= 0.9999
  assert len(np.unique(ids)) > 1
  for end in ours.prefixes or [None]:
    pictures = theirs.decode(ids[..., :end])
    assert pictures.dtype == torch.float32
    want = ours.decode(ids[..., :end])
    np.testing.assert_allclose(pictures.numpy(), want, atol=1e-4)


@pytest.mark.parametrize(
  'changed', MODELS, ids=lambda x: '-'.join(map(str, x.values()))
)
def test_a_model_gives_our_ids_and_pictures(changed, open_torch, test_images):
  ours, theirs = open_torch(**changed)
  check_same(ours, theirs, test_images)
  for name in ('codebook_size', 'factor', 'codes_per_position', 'model_hash'):
    assert getattr(theirs, name) == getattr(ours, name), name


@pytest.mark.parametrize('page', ['docs/formats.md', 'export/README.md'])
def test_the_lines_shown_run_where_the_export_was_typed(
  page, exported, test_images, run_python
):
  folder = exported.parent
  text = ((ROOT if page.startswith('docs') else folder) / page).read_text()
  [lines] = (x for _, x in blocks(text, 'python') if 'tokenizer_torch' in x)
  np.save(folder / 'images.npy', test_images)
  given = f'import numpy\nimages = numpy.load({str(folder / "images.npy")!r})'
  # In the folder where the export was typed; the card means its own.
  cwd = folder if page.startswith('docs') else exported
  done = run_python(f'{given}\n{lines}\nprint(ids.shape)', cwd=cwd)
  assert 'Size([11, 4, 4])' in done.stdout, done.stderr


def test_a_run_gives_our_ids_and_our_pictures_at_any_size(real, test_images):
  check_same(*real, test_images)
  check_same(*real, test_images[:, :12, :8])


def test_float16_gives_our_ids(shared_export, tmp_path, test_images):
  export_run(shared_export, tmp_path / 'half', float16=True)
  ids = load(tmp_path / 'half').encode(test_images)
  theirs = Torch.from_pretrained(tmp_path / 'half').encode(test_images)
  np.testing.assert_array_equal(theirs, ids)


def test_codes_far_from_the_origin_are_told_apart():
  rng = np.random.default_rng(0)
  codes = 1e3 + 0.1 * rng.standard_normal((50, 8)).astype(np.float32)
  e = np.repeat(codes, 20, 0) + np.float32(0.01)
  ids = nearest(torch.tensor(e), torch.tensor(codes))
  distance = ((e[:, None].astype(float) - codes[None]) ** 2).sum(-1)
  np.testing.assert_array_equal(ids.numpy(), distance.argmin(1))


def test_both_layouts_and_both_dtypes_are_taken(real, test_images):
  _, tokenizer = real
  images = torch.tensor(test_images)
  ids = tokenizer.encode(images)
  floats = (images.double() / 127.5 - 1).permute(0, 3, 1, 2)
  assert torch.equal(tokenizer.encode(floats), ids)
  with pytest.warns(UserWarning, match=r'in \[0, 1\] are read on \[-1, 1\]'):
    tokenizer.encode(images / 255)
  # As files of tokens hold them.
  pictures = tokenizer.decode(ids.numpy().astype(np.uint16))
  assert pictures.shape == images.shape
  first = tokenizer.decode(ids.int(), channels_first=True)
  assert torch.equal(first.permute(0, 2, 3, 1), pictures)


ZERO, ONE = np.zeros, np.zeros((1, 4, 4), int)
BAD = [
  ('vq', 'encode', ZERO((16, 16, 3)), r'multiples of 4.*\[16, 16, 3\]'),
  ('vq', 'encode', ZERO((1, 16, 18, 3)), r'got \[1, 16, 18, 3\]'),
  ('vq', 'encode', ZERO((1, 16, 16, 4)), r'got \[1, 16, 16, 4\]'),
  ('vq', 'encode', ZERO((0, 16, 16, 3)), r'got \[0, 16, 16, 3\]'),
  ('vq', 'encode', ZERO((1, 4, 4, 3), np.int32), 'float .* torch.int32'),
  ('vq', 'encode', np.full((1, 4, 4, 3), 255.0), 'float64 from 255 to 255'),
  ('vq', 'encode', np.full((1, 4, 4, 3), np.nan), 'float64 from nan'),
  ('multiscale', 'encode', ZERO((1, 12, 16, 3)), 'with sides 16, got'),
  ('vq', 'decode', ONE[0], r'ids \[B, H, W\], .*torch.int64 \[4, 4\]'),
  ('vq', 'decode', ONE / 1, 'got torch.float64'),
  ('vq', 'decode', ONE[..., None], r'got torch.int64 \[1, 4, 4, 1\]'),
  ('vq', 'decode', ONE + 64, 'from 0 to 63, got 64 to 64'),
  ('vq', 'decode', ONE - 1, 'from 0 to 63, got -1 to -1'),
  ('residual', 'decode', ZERO((1, 4, 4, 5), int), r'L in \[1, 2, 3, 4\]'),
  ('product', 'decode', ONE[..., None], r'\[B, H, W, L\] with L in \[2\]'),
  ('multiscale', 'decode', ZERO((1, 9), int), r'T in \[1, 10, 26\], .* \[1, 9'),
]


@pytest.mark.parametrize(('quantizer', 'call', 'given', 'message'), BAD)
def test_other_images_and_ids_are_refused_in_one_line(
  quantizer, call, given, message, open_torch
):
  _, tokenizer = open_torch(quantizer=quantizer)
  with one_line(message):
    getattr(tokenizer, call)(torch.as_tensor(given))


def rewrite(name, change):
  def apply(folder):
    path = folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()

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
    (shutil.rmtree, 'expected an export of rvq_jax'),
    (rewrite(CONFIG, None), 'No such file.*config.json'),
    (rewrite(WEIGHTS, None), 'got FileNotFoundError'),
    (rewrite(CONFIG, lambda _: b'{'), 'got JSONDecodeError'),
    (rewrite(CONFIG, lambda _: b'[]'), 'got TypeError'),
    (rewrite(CONFIG, lambda _: b'{}'), "KeyError: 'format_version'"),
    (rewrite_entry(), "KeyError: 'torch'; .*, use its tokenizer_torch.py"),
    (rewrite_entry(quantizer='new'), "KeyError: 'new'; if another version"),
    (rewrite_entry(activation='relu'), "KeyError: 'relu'"),
    (rewrite_entry(architecture='{"factor": 2}'), 'with another hash'),
    (rewrite(WEIGHTS, lambda x: x[:-1]), 'got SafetensorError'),
    (rewrite(WEIGHTS, lambda x: x[:-1] + bytes([x[-1] ^ 1])), 'another hash'),
    (rewrite(WEIGHTS, lambda x: x.replace(b'conv0', b'conv9')), 'another hash'),
  ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, message, exported):
  damage(exported)
  with one_line(f'^{exported}.*{message}'):
    Torch.from_pretrained(exported)


def test_a_model_of_the_hub_is_downloaded(exported, monkeypatch):
  hub, files = mock.Mock(), [WEIGHTS, CONFIG]
  hub.snapshot_download.return_value = str(exported)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  for name, tag in (('a/b', None), ('hf:a/b@v1', 'v1')):
    assert Torch.from_pretrained(name).factor == 4
    asked = mock.call('a/b', revision=tag, allow_patterns=files)
    assert hub.snapshot_download.mock_calls.pop() == asked
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # not installed
  with one_line('no/such: .*Hub, got .*huggingface_hub'):
    Torch.from_pretrained('no/such')
