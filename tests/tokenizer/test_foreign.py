"""Tokenizers of other people: imported, used by every command, given back."""

import json
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from errors import one_line
from PIL import Image

from rvq_jax import load
from rvq_jax.cli import COMMANDS
from rvq_jax.commands import program
from rvq_jax.tokenizer import foreign
from rvq_jax.tokenizer.export import export_run
from rvq_jax.tokenizer.load import import_model
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training import backend
from rvq_jax.training.build import build_model
from rvq_jax.training.config import check_config
from rvq_jax.training.loop import train

pytestmark = pytest.mark.usefixtures('one_device')
VQGAN = {'network': 'vqgan', 'ch': 32, 'ch_mult': (1, 1), 'factor': 2}
VQGAN |= {'num_res_blocks': 1, 'attn_levels': (2,), 'z_channels': 4}
VAR = {'quantizer': 'multiscale', 'sides': (1, 2, 3, 8), 'resize': 'torch'}
WEIGHTS = 'model.safetensors', 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def make(make_tiny_config):
  """Returns a function: model fields -> a tokenizer with random weights."""

  def draw(path, x):
    noise = np.random.default_rng(len(str(path))).standard_normal(x.shape)
    if path[-1].key in ('scale', 'cluster_size'):
      noise = 1 + abs(noise)
    if path[-1].key == 'kernel':
      noise /= np.sqrt(np.prod(x.shape[:-1]))
    return noise.astype(x.dtype)

  def make(**fields):
    config = make_tiny_config()
    config.model.update(VQGAN | fields)
    if fields.get('inner_product'):
      config.freeze = 'codes'
    flat = check_config(config)
    model, images = build_model(flat), np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    variables = {'batch_stats': {}, 'codebook': {}} | variables
    return Tokenizer(model, variables, config=flat, step=1)

  return make


@pytest.fixture
def give(make, tmp_path):
  """Returns a function: layout, model fields -> a tokenizer, its folder."""

  def give(layout, **fields):
    ours, folder = make(**fields), tmp_path / 'theirs'
    export_run('.', folder, layout=layout, tokenizer=ours)
    return ours, folder

  return give


@pytest.fixture
def call(monkeypatch, capsys):
  """Returns a function: a command and its arguments -> what it prints."""
  monkeypatch.setattr(program, '_prepare_logs', lambda: None)
  monkeypatch.setattr(backend, 'prepare_backend', lambda **_: None)

  def call(command, *arguments):
    COMMANDS[command].main([str(x) for x in arguments])
    return capsys.readouterr().out

  return call


@pytest.mark.parametrize(
  ('layout', 'fields', 'options'),
  [
    ('original', {}, {'rule': 'euclidean'}),
    ('original', {'ema': False, 'unit_range': True}, {'rule': 'euclidean'}),
    ('original', {'inner_product': True}, {'rule': 'inner_product'}),
    ('original', {'cosine': True, 'ema': False}, {'rule': 'cosine'}),
    ('original', VAR | {'quant_kernel': 3}, {'rule': 'euclidean'}),
    ('diffusers', {'movq': True}, {}),
    ('diffusers', {'mid_attention': False, 'attn_levels': (1,)}, {}),
  ],
  ids=str,
)
def test_what_is_given_back_is_the_same_model(
  layout, fields, options, give, tmp_path
):
  ours, folder = give(layout, **fields)
  (file,) = folder.glob('*.safetensors')
  if 'sides' in fields:
    options['sides'] = fields['sides']
  options['unit_range'] = fields.get('unit_range', False)
  theirs = import_model(file if layout == 'original' else folder, **options)
  assert theirs.model.encoder == ours.model.encoder
  assert theirs.model.decoder == ours.model.decoder
  for name in 'codebook_size', 'sides', 'quantizer':
    assert getattr(theirs, name) == getattr(ours, name)
  for name in 'cosine', 'inner_product', 'resize':
    got, want = (getattr(t.model.vq, name, None) for t in (theirs, ours))
    assert got == want
  for name in 'encoder', 'decoder':
    params = (t.variables['params'][name] for t in (theirs, ours))
    jax.tree.map(np.testing.assert_array_equal, *params)
  np.testing.assert_array_equal(*(t.codebooks()[0] for t in (theirs, ours)))
  export_run('.', tmp_path / 'again', layout=layout, tokenizer=theirs)
  again = tmp_path / 'again' / file.name
  assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
  ('layout', 'fields', 'message'),
  [
    ('torch', {}, "layout: expected original or diffusers, got 'torch'"),
    ('original', {'network': 'paper'}, 'another network'),
    ('original', {'quantizer': 'residual'}, 'codes of residual'),
    ('original', {'ch': 24}, 'channels that 32 groups'),
    ('original', VAR | {'resize': 'keys'}, "resize='keys'"),
    ('diffusers', VAR, 'multi-scale codes'),
    ('diffusers', {'cosine': True}, 'codes by cosine'),
    ('diffusers', {'inner_product': True}, 'codes by inner product'),
    ('diffusers', {'quant_kernel': 3}, 'a 3x3 convolution to the codes'),
    ('diffusers', {'ch_mult': (2, 1)}, 'a first level wider than ch'),
    ('diffusers', {'movq': True, 'z_channels': 8}, 'movq with z_channels'),
  ],
)
def test_what_a_layout_cannot_express_is_named(
  layout, fields, message, give, tmp_path
):
  with one_line(message):
    give(layout, **fields)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_import_asks_and_warns(give, call, tmp_path, capsys):
  _, folder = give('original', **VAR)
  file, output = folder / 'model.safetensors', tmp_path / 'export'
  damaged, text = tmp_path / 'damaged.ckpt', tmp_path / 'text.pt'
  damaged.write_bytes(file.read_bytes()[:-9])
  text.write_text('<html>')
  for arguments, message in (
    ((), 'expected SOURCE --output=FOLDER'),
    ((file, folder), 'expected SOURCE --output=FOLDER'),
    ((tmp_path / 'no.pt',), 'no.pt: expected a file of weights, or a folder'),
    ((text, '--rule=cosine'), 'text.pt: expected the weights of a network'),
    ((damaged, '--rule=cosine'), 'damaged.ckpt: expected the weights'),
    ((file,), 'pass --rule=euclidean|cosine|inner_product'),
    ((file, '--rule=dot'), "expected euclidean, cosine, inner_product, got 'd"),
    ((file, '--rule=euclidean', '--sides=(1,a)'), 'sides'),
  ):
    with pytest.raises(SystemExit) as ended:
      call('import', *arguments, f'--output={output}')
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line
    assert not output.exists()
  flags = '--rule=euclidean', '--sides=(1,2,3,8)', '--license=mit'
  out = call('import', file, *flags, '--name=Small', f'--output={output}')
  first, warning = out.splitlines()
  assert '16 x 16 pixels to 78 tokens of 16 codes, PSNR of a photog' in first
  assert warning.startswith('warning: PSNR under 15 dB; try another --rule')
  card = (output / 'README.md').read_text()
  assert '# Small' in card and 'license: mit' in card
  assert 'with weights from model.safetensors' in card
  assert load(output).sides == (1, 2, 3, 8)


def test_a_known_name_of_the_hub_needs_no_rule(give, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub := mock.Mock())
  _, folder = give('original', cosine=True)
  hub.snapshot_download.return_value = str(folder)
  name = 'FoundationVision/vq-ds16-c2i'
  tokenizer = load(f'hf:{name}@v1')
  assert tokenizer.model.vq.cosine and tokenizer.config['model.ch'] == 32
  assert tokenizer.image_size == 256
  files = ['config.json', 'model.safetensors']
  assert hub.mock_calls == [
    mock.call.snapshot_download(name, revision='v1', allow_patterns=files)
  ]
  hub.snapshot_download.side_effect = RuntimeError('no route\nto host')
  with one_line(f'fetch model.safetensors of {name} .*--rule=cosine', OSError):
    load(f'hf:{name}')
  hub.snapshot_download.side_effect = [str(tmp_path)]
  with one_line('holds no model.safetensors', OSError):
    load(f'hf:{name}')


def test_every_known_name_has_a_rule_and_one_of_the_hub_files():
  for name, known in foreign.KNOWN.items():
    assert known.rule in foreign.RULES
    assert known.files or '/' not in name, name


def test_a_diffusers_folder_is_a_tokenizer(give, tmp_path):
  ours, folder = give('diffusers')
  about = json.loads((folder / 'config.json').read_text())
  ids = ours.encode(x := np.zeros((1, 16, 16, 3), np.uint8))
  np.testing.assert_array_equal(load(folder).encode(x), ids)
  assert load(folder).image_size == 16
  (folder / 'config.json').write_text(
    json.dumps(about | {'norm_num_groups': 8})
  )
  with one_line('expected 32 groups of GroupNorm, got 8'):
    load(folder)


def _pixels(path):
  with Image.open(path) as image:
    return np.asarray(image)


@pytest.mark.slow
def test_an_imported_model_goes_through_everything(
  give, call, make_tiny_config, image_folder, tmp_path
):
  _, folder = give('original')
  path = {n: tmp_path / n for n in ('export', 'run', 'again', 'back', 'ev')}
  source = next((image_folder / 'test').rglob('*.png'))
  npz, png, page = (tmp_path / f'x.{end}' for end in ('npz', 'png', 'html'))
  call(
    *('import', folder / 'model.safetensors', '--rule=euclidean'),
    *('--image_size=16', f'--output={path["export"]}'),
  )
  model = f'--workdir={path["export"]}'
  images = f'--input={image_folder}'
  assert '80 tokens' in call('encode', model, source, npz)
  call('decode', model, npz, png)
  assert _pixels(png).shape == _pixels(source).shape
  assert 'mse' in call('evaluate', model, images, f'--output={path["ev"]}')
  assert '11 images' in call('explore', model, images, f'--output={page}')
  config = make_tiny_config()
  config.freeze, config.num_steps, config.data.image_size = (
    'encoder,codes',
    2,
    16,
  )
  config.model.update(VQGAN | {'ema': False, 'estimator': 'ste'})
  train(config, path['run'], init=lambda: load(path['export']))
  x = _pixels(source)[None, :16, :16]
  before, after = load(path['export']), load(path['run'])
  np.testing.assert_array_equal(after.encode(x), before.encode(x))
  assert np.abs(after.reconstruct(x) - before.reconstruct(x)).max() > 0
  run = f'--workdir={path["run"]}'
  call('export', run, f'--output={path["again"]}')
  assert load(path['again']).model_hash == after.model_hash
  call('export', run, f'--output={path["back"]}', '--layout=diffusers')
  back = load(path['back'])
  np.testing.assert_array_equal(back.encode(x), after.encode(x))
  np.testing.assert_array_equal(
    back.decode(after.encode(x)), after.reconstruct(x)
  )
